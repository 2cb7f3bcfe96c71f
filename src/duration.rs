//! Durations as people write them in settings: `#[serde(with = "crate::duration")]` reads `90s`, `6h` or `30d`.
//!
//! Used by the settings of every floor; knows nothing of the rest.

use std::time::Duration;

use serde::{Deserialize as _, Deserializer, de::Error as _};

/// Reads a number with a unit. Anything else is an error that says how to write it.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|_| {
        D::Error::custom(format!(
            "{text:?} is not a duration: write a number with a unit, such as 90s, 6h or 30d"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Settings {
        #[serde(with = "crate::duration")]
        ttl: Duration,
    }

    #[test]
    fn a_duration_is_a_number_with_a_unit() {
        let read = |text: &str| toml::from_str::<Settings>(text).map(|settings| settings.ttl);
        assert_eq!(read("ttl = '90s'"), Ok(Duration::from_secs(90)));
        assert_eq!(read("ttl = '1h 30m'"), Ok(Duration::from_secs(5400)));
        assert_eq!(read("ttl = '0s'"), Ok(Duration::ZERO));
        for text in ["ttl = ''", "ttl = '5'", "ttl = '-5s'", "ttl = '5 parsecs'"] {
            assert!(read(text).unwrap_err().to_string().contains("such as 90s, 6h or 30d"));
        }
    }
}
