"""Hosts: training and evaluation code of others that the energy head is added to, without a change of their models."""
