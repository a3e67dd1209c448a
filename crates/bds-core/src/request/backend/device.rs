//! Attaches a device to a backend: at most one at a time, which references the backend as long as
//! it is attached.

use std::sync::Arc;

use super::{Backend, Inner};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;

/// An attached device. Dropping it detaches the device.
///
/// The device reads and writes through [`Device::backend`]. Ejecting the medium does not detach it:
/// its requests fail with `NoMedium` until another medium is inserted.
#[must_use = "the device is detached when this is dropped"]
#[derive(Debug)]
pub struct Device {
    backend: Backend,
    name: Arc<str>,
}

impl Device {
    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The backend it uses.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Detaches the device: the same as dropping it.
    pub fn detach(self) {
        drop(self);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let inner = &*self.backend.inner;
        // Its permissions go with it, and so does the one that could resume its requests.
        self.backend.graph.release_root_access(&inner.edge);
        inner.state().policies = None;
        inner.resume();
        inner.emit_device_event(&self.name, false);
        // Last: a device that attaches from here on finds the backend reset.
        inner.state().device = None;
    }
}

impl Backend {
    /// Attaches a device, until the returned handle is dropped. One at a time. Resets
    /// [`Backend::io_status`] and repeats stopped requests.
    ///
    /// When it detaches, the backend keeps its medium but drops all permissions on it and shares
    /// everything; the next user sets its own with [`Backend::set_access`]. Error policies are
    /// reset.
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
    /// `InUse` names the device that is attached.
    pub fn attach_device(&self, name: &str) -> Result<Device> {
        let name: Arc<str> = name.into();
        {
            let mut state = self.inner.state();
            if let Some(other) = &state.device {
                let words = format!("device '{other}' uses the backend: detach it first");
                let error = Error::new(ErrorKind::InUse, words);
                return Err(error.field("backend", self.name()));
            }
            state.device = Some(Arc::clone(&name));
        }
        self.inner.resume();
        self.inner.emit_device_event(&name, true);
        Ok(Device { backend: self.clone(), name })
    }

    /// Name of the attached device.
    pub fn device(&self) -> Option<Arc<str>> {
        self.inner.state().device.clone()
    }
}

impl Inner {
    fn emit_device_event(&self, device: &str, is_attached: bool) {
        self.events.emit(|| {
            let (backend, device) = (self.name.to_string(), device.to_owned());
            match is_attached {
                true => Event::DeviceAttached { backend, device },
                false => Event::DeviceDetached { backend, device },
            }
        });
    }
}
