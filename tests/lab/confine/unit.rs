//! Reads the settings of a unit file.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

/// Settings of the section `[Service]`, in the order of the file.
#[derive(Clone, Debug, Default)]
pub struct Unit(Vec<(String, String)>);

impl Unit {
    /// Reads a unit file.
    ///
    /// # Errors
    ///
    /// When the file can't be read.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("Cannot read the unit {}", path.display()))?;
        Ok(Self::parse(&text))
    }

    /// Parses the text of a unit file without continuation lines; the project's units have none.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut is_service = false;
        let mut settings = Vec::new();
        for line in text.lines().map(str::trim) {
            if line.starts_with('[') {
                is_service = line == "[Service]";
            } else if is_service
                && !line.starts_with('#')
                && let Some((key, value)) = line.split_once('=')
            {
                settings.push((key.to_owned(), value.to_owned()));
            }
        }
        Self(settings)
    }

    /// Returns all values of a setting. An empty value clears the values before it.
    #[must_use]
    pub fn values(&self, key: &str) -> Vec<&str> {
        let of_key = self.0.iter().filter(|(other, _)| other == key);
        let values: Vec<&str> = of_key.map(|(_, value)| value.as_str()).collect();
        let start = values.iter().rposition(|value| value.is_empty());
        values
            .get(start.map_or(0, |start| start + 1)..)
            .unwrap_or_default()
            .to_vec()
    }

    /// Returns the words of all values of a setting, in order.
    #[must_use]
    pub fn words(&self, key: &str) -> Vec<&str> {
        let values = self.values(key);
        values.into_iter().flat_map(str::split_whitespace).collect()
    }

    /// Returns the last value of a setting.
    #[must_use]
    pub fn last(&self, key: &str) -> Option<&str> {
        self.values(key).pop()
    }

    /// Returns true if the last value of a setting is a systemd boolean for true.
    #[must_use]
    pub fn is_set(&self, key: &str) -> bool {
        matches!(self.last(key), Some("yes" | "true" | "on" | "1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_the_service_are_gathered_and_an_empty_one_takes_them_back() {
        let unit = Unit::parse(
            "[Unit]\nUMask=1\n[Service]\n# UMask=2\nUMask=0077\nX=a b\nX=c\nY=1\nY=\nY=2\nZ=yes\n",
        );
        assert_eq!(unit.last("UMask"), Some("0077"));
        assert_eq!(unit.words("X"), ["a", "b", "c"]);
        assert_eq!(unit.words("Y"), ["2"]);
        assert!(unit.is_set("Z") && !unit.is_set("X") && !unit.is_set("none"));
    }
}
