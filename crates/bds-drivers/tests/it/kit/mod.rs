//! Fixtures that the integration tests share.
//!
//! ```text
//! fixture     a graph on a simulated disk
//! test_env    where images are made: simulated disk or host
//! image_kind  kinds of image with their models
//! disk        an open image, workloads, comparison with a model
//! requests    polling requests by hand
//! ```

mod disk;
mod fixture;
mod image_kind;
#[cfg(feature = "qcow2")]
mod requests;
mod test_env;

pub(crate) use disk::{Disk, play, resize_to};
pub(crate) use fixture::Fixture;
#[cfg(feature = "qcow2")]
pub(crate) use fixture::{block_on_sim, trusting_graph};
pub(crate) use image_kind::ImageKind;
#[cfg(feature = "qcow2")]
pub(crate) use requests::{filled, poll_once, within, writer};
pub(crate) use test_env::{TestEnv, sim_with_image};
