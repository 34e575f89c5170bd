"""How fast it is: our model in each weight mode beside transformers and llama.cpp, in one run."""
