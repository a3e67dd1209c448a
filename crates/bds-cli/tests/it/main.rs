//! Tests of the `bds` binary: output, exit codes, files left behind, and comparison with QEMU's
//! tools over all formats.

mod amend;
mod backup;
mod backup_chain;
mod backup_faults;
mod backup_group;
mod backup_resume;
mod bitmap;
mod chain_identity;
mod chain_jobs;
mod checkpoint;
mod command_lines;
mod convert_errors;
mod copied_content;
mod drawing;
mod existing_output;
mod file_names;
mod like_qemu;
mod manual;
mod matrix;
mod messages;
mod mirror;
mod mirror_record;
mod process;
mod programs;
mod qemu_cells;
mod qemu_check;
mod qemu_convert;
mod qemu_measure;
mod same_file;
mod verify;
mod workdir;
