"""Speed, and nothing else: without this folder the project is slower and works.

The decoder layer is the Python one in every mode. What is compiled here are leaves of it: matrix products with
weights in 16 or 8 bits (`linear`), and `sdpa` (`attention`). Each is a claim about the Python that it stands
for, and is compared with it before it runs (`claims`). The C is in csrc/, and `build` compiles it.
"""
