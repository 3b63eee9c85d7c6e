"""The commands of `offramp-lab`; what they run is imported when one of them is run."""
