"""Questions about the class token that need training; each file is one question."""
