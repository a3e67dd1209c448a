//! Registry of drivers by name.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::{Category, DriverType};
use crate::error::{Error, ErrorKind, Result};

/// The drivers of a program. Filled once, then shared.
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

    /// The format driver of this name.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such driver, or it is a protocol or filter.
    pub fn format(&self, name: &str) -> Result<&Arc<dyn DriverType>> {
        match self.types.get(name) {
            Some(driver) if driver.category() == Category::Format => Ok(driver),
            _ => {
                let known: Vec<&str> = self.names(Category::Format).collect();
                let words =
                    format!("'{name}' is not an image format (there are: {})", known.join(", "));
                Err(Error::new(ErrorKind::InvalidInput, words))
            }
        }
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

#[cfg(test)]
mod tests {
    use super::super::{BoxFuture, Driver, OpenContext, PROBE_LEN, probe};
    use super::*;
    use crate::options::OptionSpec;

    struct Kind(&'static str, Category, u8);

    impl DriverType for Kind {
        fn name(&self) -> &'static str {
            self.0
        }
        fn category(&self) -> Category {
            self.1
        }
        fn open_options(&self) -> &'static [OptionSpec] {
            &[]
        }
        fn open<'a>(
            &'a self,
            _context: &'a mut OpenContext<'_>,
        ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
            unreachable!("the registry and probes open nothing")
        }
        fn probe(&self, head: &[u8], file_len: u64) -> u8 {
            assert!(head.len() <= PROBE_LEN);
            if file_len > 0 { self.2 } else { 0 }
        }
    }

    fn registry() -> Registry {
        let mut registry = Registry::new();
        for kind in [
            Kind("sure", Category::Format, 100),
            Kind("b-guess", Category::Format, 50),
            Kind("a-guess", Category::Format, 50),
            Kind("no", Category::Format, 0),
            Kind("filter", Category::Filter, 100),
        ] {
            registry.register(Arc::new(kind)).unwrap();
        }
        registry
    }

    #[test]
    fn a_second_driver_of_a_name_is_refused_and_the_first_stays() {
        let mut registry = registry();
        let error = registry.register(Arc::new(Kind("sure", Category::Filter, 0))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(registry.driver("sure").unwrap().category(), Category::Format);
    }

    #[test]
    fn an_unknown_name_is_refused_with_a_list_of_the_known_ones() {
        let registry = registry();
        let text =
            |result: Result<&Arc<dyn DriverType>>| result.map(|_| ()).unwrap_err().to_string();
        let unknown = text(registry.driver("x"));
        assert!(
            unknown.contains("'x' (there are: a-guess, b-guess, filter, no, sure)"),
            "{unknown}"
        );
        let wrong = text(registry.format("filter"));
        assert!(
            wrong.contains("not an image format (there are: a-guess, b-guess, no, sure)"),
            "{wrong}"
        );
    }

    #[test]
    fn probes_list_formats_only_with_the_most_likely_first() {
        let found = probe(&registry(), &vec![0; PROBE_LEN + 1], 1);
        let names: Vec<&str> = found.iter().map(|candidate| candidate.driver).collect();
        assert_eq!(names, ["sure", "a-guess", "b-guess"]);
        assert!(probe(&registry(), &[], 0).is_empty());
    }
}
