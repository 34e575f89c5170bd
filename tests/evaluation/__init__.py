"""Tests of tinyllama/evaluation."""
