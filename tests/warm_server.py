"""What tests/warm.py forks from: imports, waits for a command on the socket of the given number, and in a fork becomes it."""

import importlib
import json
import os
import resource
import runpy
import socket
import sys

for name in ("deepspeed.ops.adam", "torchvision", "torch.utils.tensorboard", "transformers.models.bert.modeling_bert"):
    importlib.import_module(name)
sock = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, files, _, _ = socket.recv_fds(sock, 1 << 20, 3)
    if not message:
        sys.exit()
    if not (between := os.fork()):
        if not (pid := os.fork()):
            break
        sock.send(str(pid).encode())
        os._exit(0)  # so that the command becomes a child of whoever asked for it
    os.waitpid(between, 0)
    sock.send(b"orphaned")
    for file in files:
        os.close(file)

sock.close()
for number, file in enumerate(files):
    os.dup2(file, number)
    os.close(file)
told = json.loads(message)
os.environ.clear()
os.environ.update(told["env"])
os.chdir(told["cwd"])
resource.setrlimit(resource.RLIMIT_FSIZE, told["file_size"])
if told["session"]:
    os.setsid()
sys.path[:1] = [told["path"], *filter(None, told["env"].get("PYTHONPATH", "").split(":"))]
sys.argv[:] = told["words"]
if told["module"]:
    runpy.run_module(told["module"], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
