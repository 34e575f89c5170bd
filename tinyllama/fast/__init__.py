"""Speed, and nothing else: without this folder the project is slower and works.

The decoder layer is the Python one in every mode. Only leaves of it are compiled here: matrix products with
weights in 16 or 8 bits (`linear`), and `RMSNorm` (`norm`). Each is a claim about the Python that it stands
for, and is compared with it before it runs (`claims`). The C is in csrc/, and `build` compiles it.
"""
