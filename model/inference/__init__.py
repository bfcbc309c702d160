"""Reading and writing byte by byte: the stream, sampling, and UTF-8 text as it comes."""
