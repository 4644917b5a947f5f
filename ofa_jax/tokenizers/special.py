"""Ids of the special symbols of OFA's dictionaries: the same in each, as fairseq numbers them."""

BOS, PAD, EOS, UNK = range(4)
NUM_SPECIAL = 4
