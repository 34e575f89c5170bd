"""The benchmark: this model beside transformers, llama.cpp and the machine's own limits, in one run."""
