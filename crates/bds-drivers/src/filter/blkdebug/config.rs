//! Parses a file of rules: QEMU's `config` option.
//!
//! Sections `[inject-error]` and `[set-state]`, one rule each, of lines `key = "value"`. Comments
//! begin with `#`. A section becomes the same tree as the option of that name, so both mean the
//! same and fail the same. A file has at most 1 MiB.

use std::path::Path;

use bds_core::{Error, ErrorKind, Result};
use bds_io::{Buf, Fs, OpenOptions};
use serde_json::{Map, Value};

/// Longest file that is read, in bytes.
const MAX_LEN: usize = 1 << 20;

/// The rules of a file, by section.
#[derive(Clone, Debug, Default)]
pub(super) struct FileRules {
    pub(super) inject: Vec<Value>,
    pub(super) set_state: Vec<Value>,
}

impl FileRules {
    /// Reads and parses the file `path`.
    pub(super) async fn read(fs: &Fs, path: &str) -> Result<Self> {
        let named = |e| Error::io(e, "cannot read the rules (option 'config')").file(path);
        let file = fs.open(Path::new(path), &OpenOptions::default()).map_err(named)?;
        // A FIFO could make the reader wait for ever.
        if !file.kind().is_seekable() {
            let words = format!(
                "{}, which holds no rules (option 'config'): name a regular file",
                file.kind().describe()
            );
            return Err(Error::new(ErrorKind::InvalidInput, words).file(path));
        }
        let buf = Buf::zeroed(MAX_LEN + 1, 4096);
        let mut len = 0;
        loop {
            let rest = buf.slice(len..MAX_LEN + 1);
            match file.read(len as u64, rest).await.map_err(named)? {
                0 => break,
                read_len => len += read_len,
            }
            if len > MAX_LEN {
                let words = "a file of rules (option 'config') may not be longer than 1 MiB";
                return Err(Error::new(ErrorKind::LimitExceeded, words).file(path));
            }
        }
        let bytes = buf.iov().to_vec(0..len);
        let text = String::from_utf8(bytes).map_err(|_| {
            Error::new(ErrorKind::InvalidInput, "a file of rules must be text").file(path)
        })?;
        Self::parse(&text).map_err(|error| error.file(path))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut rules = Self::default();
        let mut current: Option<(bool, Map<String, Value>)> = None;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            let wrong = |words: &str| {
                Error::new(ErrorKind::InvalidInput, format!("line {}: {words}", number + 1))
                    .field("config", line)
            };
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                rules.end(current.take());
                let is_inject = match name {
                    "inject-error" => true,
                    "set-state" => false,
                    _ => return Err(wrong("a section must be [inject-error] or [set-state]")),
                };
                current = Some((is_inject, Map::new()));
                continue;
            }
            let Some((_, map)) = &mut current else {
                return Err(wrong("a value must stand in a section"));
            };
            let pair = line.split_once('=').map(|(key, value)| (key.trim(), value.trim()));
            let value = |text: &'_ str| {
                text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).map(str::to_owned)
            };
            let Some((key, Some(value))) = pair.map(|(key, text)| (key, value(text))) else {
                return Err(wrong("a value is written as key = \"value\""));
            };
            if map.insert(key.to_owned(), value.into()).is_some() {
                return Err(wrong("the key stands there twice"));
            }
        }
        rules.end(current);
        Ok(rules)
    }

    fn end(&mut self, section: Option<(bool, Map<String, Value>)>) {
        match section {
            None => {}
            Some((true, map)) => self.inject.push(map.into()),
            Some((false, map)) => self.set_state.push(map.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sections_become_rules_in_their_order() {
        let text = "# two\n[inject-error]\nevent = \"none\"\nerrno=\"28\"\n\n[set-state]\nnew_state = \"2\"\n[inject-error]\n";
        let rules = FileRules::parse(text).unwrap();
        assert_eq!(rules.inject, [json!({"event": "none", "errno": "28"}), json!({})]);
        assert_eq!(rules.set_state, [json!({"new_state": "2"})]);
        assert!(FileRules::parse("").unwrap().inject.is_empty());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, word) in [
            ("[inject]", "line 1"),
            ("errno = \"5\"", "section"),
            ("[inject-error]\nerrno = 5", "line 2"),
            ("[inject-error]\nerrno", "key = "),
            ("[inject-error]\na = \"1\"\na = \"2\"", "twice"),
        ] {
            let error = FileRules::parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
