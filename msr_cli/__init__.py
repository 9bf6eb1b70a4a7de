"""The `msr` command: parses, calls the library, prints; decides nothing."""
