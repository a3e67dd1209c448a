//! Name → driver.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::{Category, DriverType};
use crate::error::{Error, ErrorKind, Result};

/// The drivers a program has. Filled once, then shared.
#[derive(Clone, Default)]
pub struct Registry {
    types: BTreeMap<&'static str, Arc<dyn DriverType>>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.types.keys()).finish()
    }
}

impl Registry {
    /// No drivers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a driver.
    ///
    /// # Errors
    /// `AlreadyExists` if one of this name is there; it stays.
    pub fn register(&mut self, driver: Arc<dyn DriverType>) -> Result<()> {
        let name = driver.name();
        if self.types.contains_key(name) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("a driver '{name}' is registered already"),
            ));
        }
        self.types.insert(name, driver);
        Ok(())
    }

    /// The driver of this name.
    ///
    /// # Errors
    /// `InvalidInput`, with the names there are.
    pub fn driver(&self, name: &str) -> Result<&Arc<dyn DriverType>> {
        self.types.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.types.keys().copied().collect();
            Error::new(
                ErrorKind::InvalidInput,
                format!("unknown driver '{name}' (there are: {})", known.join(", ")),
            )
        })
    }

    /// The format of this name: what an image may be said to be.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such driver, or it is a protocol or filter.
    pub fn format(&self, name: &str) -> Result<&Arc<dyn DriverType>> {
        let driver = self.driver(name)?;
        if driver.category() == Category::Format {
            return Ok(driver);
        }
        let known: Vec<&str> = self.names(Category::Format).collect();
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!("'{name}' is not an image format (there are: {})", known.join(", ")),
        ))
    }

    /// The names of one category, in order.
    pub fn names(&self, category: Category) -> impl Iterator<Item = &'static str> + '_ {
        self.types.values().filter(move |t| t.category() == category).map(|t| t.name())
    }

    /// All drivers, in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn DriverType>> {
        self.types.values()
    }
}
