"""What other libraries do not promise to keep: private names, and names that changed between their versions.

One module a library. A name is looked up once, when it is first needed; the rest of fastattn asks here and nowhere else
(`tests/_compat/test_only_here.py` looks). A name that is gone is done without, slower and as right; where that cannot
be, `Gone` says in a sentence what is missing and which versions have it. Importing a module here imports no library
but torch, `hf` and `gluon` excepted.
"""
