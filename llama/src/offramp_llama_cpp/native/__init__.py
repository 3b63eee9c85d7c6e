"""What llama.cpp calls while it computes: in C, compiled when it is first needed."""
