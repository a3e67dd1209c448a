//! The tool from outside: what it prints, what it returns, what it leaves behind.

mod like_qemu;
mod stopped;
mod tool;
mod words;
