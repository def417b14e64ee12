"""Published results: one small file per finished run, and the tables made from them."""
