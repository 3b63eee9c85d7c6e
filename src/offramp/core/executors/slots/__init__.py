"""Engine parts that run rows of many lengths from one preallocated cache."""
