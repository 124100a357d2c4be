"""Teachers' answers, computed once."""
