"""One file a verb: parse the words, call the library, say what came out."""
