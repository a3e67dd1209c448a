//! What is done to the house: demo, test, matrix, tidy, bench, doctor, ci.

fn main() {}
