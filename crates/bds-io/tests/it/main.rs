//! bds-io from outside.

mod sim_crash;
mod sim_faults;
mod sim_files;
mod sim_replay;
mod sim_versions;
