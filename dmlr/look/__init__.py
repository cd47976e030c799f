"""One question opened up: every state of its loop, what-ifs, and the widgets around them."""
