//! The tool from outside: what it prints, what it returns, what it leaves behind, and how all that compares with QEMU's
//! tools over the matrix of formats.

mod drawing;
mod file_names;
mod kept_content;
mod like_qemu;
mod manners;
mod manual;
mod matrix;
mod qemu_cells;
mod qemu_check;
mod qemu_convert;
mod qemu_measure;
mod right_data;
mod same_file;
mod spelling;
mod stopped;
mod tool;
mod tools;
mod words;
