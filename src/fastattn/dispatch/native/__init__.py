"""Calls that came back, served without Python: `attention.cpp`, compiled on this machine (`library.py`), and what it is
told (`calls.py`).

FASTATTN_NATIVE=0 does without. So does a machine without a C++ compiler: its calls take a few microseconds more.
"""
