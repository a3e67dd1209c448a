//! Counts, times on the virtual clock, histograms and intervals.
