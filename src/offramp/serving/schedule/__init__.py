"""When the deep layers run: measured costs, a simulation, and what is chosen by them."""
