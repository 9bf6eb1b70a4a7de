"""What the tests share: a real PostgreSQL, and the installed command."""
