"""Data sets in other layouts than COCO's and folders of masks: recognised by looking, converted once, in the cache.

Each module reads one format. What it writes is checked like any other data.
"""
