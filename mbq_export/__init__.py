"""The workstation side: checkpoint in, bundle out."""
