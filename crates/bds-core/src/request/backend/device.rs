//! The one device that uses a backend: it holds a reference to the backend for exactly as long as it is attached.

use std::sync::Arc;

use super::{Backend, Inner};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;

/// A device's use of a backend: detached when this is dropped.
///
/// The device reads and writes through [`Device::backend`]. Taking the medium away does not detach it: its requests fail with
/// `NoMedium` then, and it may find another medium later.
#[must_use = "the device is detached when this is dropped"]
#[derive(Debug)]
pub struct Device {
    backend: Backend,
    name: Arc<str>,
}

impl Device {
    /// Under what name the device is attached.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The backend it uses.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The device lets go: the same as dropping it.
    pub fn detach(self) {
        drop(self);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let inner = &*self.backend.inner;
        // What it asked for was its own; and nobody is left to decide for its requests.
        self.backend.graph.release_root_access(&inner.edge);
        inner.desk().policies = None;
        inner.resume();
        inner.tell_device(&self.name, false);
        // Last: who attaches from here on finds everything as it should be.
        inner.desk().device = None;
    }
}

impl Backend {
    /// Lets a device use the backend until the answer is dropped. One at a time. The status of former errors is forgotten, and
    /// requests that wait for a decision are tried again.
    ///
    /// When it detaches, the backend keeps its medium but asks nothing of it any more, and lets others do everything: who uses it
    /// next says what he wants with [`Backend::set_access`]. Error policies that were set are forgotten.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use bds_core::graph::{Graph, GraphConfig};
    /// # let graph = Graph::new(GraphConfig::new(Arc::new(bds_core::driver::Registry::new())));
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// let drive = Backend::empty(&graph, BackendOptions::default())?;
    /// let disk = drive.attach_device("virtio0")?;
    /// let error = drive.attach_device("scsi1").unwrap_err();
    /// assert!(error.to_string().contains("virtio0"), "names the other one");
    /// disk.detach();
    /// assert_eq!(drive.device(), None);
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InUse` names the device that uses it.
    pub fn attach_device(&self, name: &str) -> Result<Device> {
        let name: Arc<str> = name.into();
        {
            let mut desk = self.inner.desk();
            if let Some(other) = &desk.device {
                let words = format!("device '{other}' uses the backend: detach it first");
                let error = Error::new(ErrorKind::InUse, words);
                return Err(error.field("backend", self.name()));
            }
            desk.device = Some(Arc::clone(&name));
        }
        self.inner.resume();
        self.inner.tell_device(&name, true);
        Ok(Device { backend: self.clone(), name })
    }

    /// The device that uses it.
    pub fn device(&self) -> Option<Arc<str>> {
        self.inner.desk().device.clone()
    }
}

impl Inner {
    fn tell_device(&self, device: &str, is_attached: bool) {
        self.events.emit(|| {
            let (backend, device) = (self.name.to_string(), device.to_owned());
            match is_attached {
                true => Event::DeviceAttached { backend, device },
                false => Event::DeviceDetached { backend, device },
            }
        });
    }
}
