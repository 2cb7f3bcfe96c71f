//! The layers of the configuration, put together: which keys there are, who set what, and what may be shown.
//!
//! Called by `config` alone. Knows keys and texts, not what they mean.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ::config::builder::{ConfigBuilder, DefaultState};
use ::config::{Config as Layers, ConfigError as LayerError, File, FileFormat};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::{ConfigError, Overrides};

/// Every key with its default; the reference that people read.
pub const DEFAULTS: &str = include_str!("../../config/default.toml");

/// What environment variables of ours begin with.
const PREFIX: &str = "WHARFINGER_";

/// The one key without a default: a list, that only a file can hold.
const ISSUERS: &str = "issuers";

/// Keys whose value is shown as `***`. Of `database.url` only the password is hidden.
const SECRETS: [&str; 2] = ["storage.secret_access_key", "storage.session_token"];

type Result<T> = std::result::Result<T, ConfigError>;

/// The outcome, not yet checked beyond the names of its keys.
pub struct Merged {
    defaults: Table,
    layers: Layers,
    file: Option<(PathBuf, Table)>,
    /// By dotted key: the variable or the flag that set it.
    sources: BTreeMap<String, String>,
    pub warnings: Vec<String>,
}

impl Merged {
    pub fn read(flags: &Overrides, environment: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let defaults = parse(DEFAULTS, Path::new("config/default.toml"))?;
        let variables = Variables::read(&keys(&defaults), environment)?;
        let mut builder = Layers::builder().add_source(File::from_str(DEFAULTS, FileFormat::Toml));
        let mut sources = BTreeMap::new();

        let mut file = None;
        if let Some(path) = flags.file.as_ref().or(variables.file.as_ref()) {
            let name = path.display();
            let text = fs::read_to_string(path)
                .map_err(|error| ConfigError(format!("can't read the configuration file {name}: {error}")))?;
            let given = parse(&text, path)?;
            if let Some(key) = unknown_key(&defaults, &given, "") {
                return Err(ConfigError(format!(
                    "unknown key {key} in {name}: correct or remove it; config/default.toml explains every key"
                )));
            }
            builder = builder.add_source(File::from_str(&text, FileFormat::Toml));
            file = Some((path.clone(), given));
        }
        for (key, (variable, value)) in variables.values {
            builder = set(builder, &key, value)?;
            sources.insert(key, variable);
        }
        for (key, value) in &flags.values {
            builder = set(builder, key, value.clone())?;
            sources.insert((*key).to_owned(), format!("--{}", key.replace(['.', '_'], "-")));
        }
        let layers = builder.build().map_err(|error| ConfigError(error.to_string()))?;
        Ok(Self {
            defaults,
            layers,
            file,
            sources,
            warnings: variables.warnings,
        })
    }

    pub fn deserialize<T: DeserializeOwned>(&self) -> Result<T> {
        self.layers
            .clone()
            .try_deserialize()
            .map_err(|error| self.explain(error))
    }

    /// An error about one key that says where its value was set.
    pub fn blame(&self, key: &str, text: &str) -> ConfigError {
        // The crate writes `issuers[0]name`.
        let key = key.replace(']', "].");
        let key = key.trim_end_matches('.');
        // What lies inside an array was set where the array was.
        let top = key.split('[').next().unwrap_or(key);
        let in_file = || Some(&self.file.as_ref().filter(|(_, table)| holds(table, top))?.0);
        match (self.sources.get(key), in_file()) {
            (Some(source), _) => ConfigError(format!("{key} ({source}): {text}")),
            (None, Some(path)) => ConfigError(format!("{key} ({}): {text}", path.display())),
            (None, None) => ConfigError(format!("{key}: {text}")),
        }
    }

    fn explain(&self, error: LayerError) -> ConfigError {
        match error {
            LayerError::Type {
                unexpected,
                expected,
                key: Some(key),
                ..
            } => self.blame(&key, &format!("must be {expected}, not {unexpected}")),
            LayerError::At {
                error, key: Some(key), ..
            } => {
                let text = error.to_string();
                match text.split_once(" does not have variant constructor ") {
                    Some((_, word)) => self.blame(
                        &key,
                        &format!("{word:?} is not one of its words; config/default.toml lists them"),
                    ),
                    None => self.blame(&key, &text),
                }
            }
            LayerError::NotFound(key) => self.blame(&key, "is missing"),
            other => ConfigError(other.to_string()),
        }
    }

    /// Every key with its value in the type of its default, secrets hidden.
    pub fn shown(&self) -> Result<Table> {
        let mut table = self.section(&self.defaults, "").map_err(|error| self.explain(error))?;
        if let Ok(issuers) = self.layers.get::<Value>(ISSUERS) {
            table.insert(ISSUERS.to_owned(), issuers);
        }
        Ok(table)
    }

    fn section(&self, defaults: &Table, path: &str) -> std::result::Result<Table, LayerError> {
        let show = |(name, default): (&String, &Value)| {
            let key = join(path, name);
            let value = match default {
                Value::Table(section) => Value::Table(self.section(section, &key)?),
                Value::Integer(_) => self.layers.get_int(&key)?.into(),
                Value::Boolean(_) => self.layers.get_bool(&key)?.into(),
                Value::Array(_) => self.layers.get(&key)?,
                _ => match self.layers.get_string(&key)? {
                    url if key == "database.url" => redact_url(&url).into(),
                    text if SECRETS.contains(&key.as_str()) && !text.is_empty() => "***".into(),
                    text => text.into(),
                },
            };
            Ok((name.clone(), value))
        };
        defaults.iter().map(show).collect()
    }
}

/// A database URL with its password hidden and the rest shown.
pub fn redact_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return if url.is_empty() {
            String::new()
        } else {
            "***".to_owned()
        };
    };
    // The last @ ends the user part even of a password that someone forgot to percent-encode.
    let rest = match rest.rsplit_once('@') {
        Some((user, host)) => match user.split_once(':') {
            Some((name, _)) => format!("{name}:***@{host}"),
            None => rest.to_owned(),
        },
        None => rest.to_owned(),
    };
    let rest = match rest.split_once('?') {
        Some((place, query)) => {
            let query: Vec<_> = query
                .split('&')
                .map(|pair| {
                    if pair.starts_with("password=") {
                        "password=***"
                    } else {
                        pair
                    }
                })
                .collect();
            format!("{place}?{}", query.join("&"))
        }
        None => rest,
    };
    format!("{scheme}://{rest}")
}

/// What the environment says.
struct Variables {
    file: Option<PathBuf>,
    /// By dotted key: the variable and the value.
    values: BTreeMap<String, (String, String)>,
    warnings: Vec<String>,
}

impl Variables {
    fn read(keys: &[String], environment: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let keys: BTreeMap<String, &String> = keys
            .iter()
            .map(|key| (format!("{PREFIX}{}", key.to_uppercase().replace('.', "__")), key))
            .collect();
        let mut read = Self {
            file: None,
            values: BTreeMap::new(),
            warnings: Vec::new(),
        };
        for (name, value) in environment {
            if !name.starts_with(PREFIX) {
                continue;
            }
            let (key, value) = if name == "WHARFINGER_CONFIG" {
                read.file = Some(value.into());
                continue;
            } else if let Some(key) = keys.get(&name) {
                (*key, value)
            } else if let Some(key) = name.strip_suffix("_FILE").and_then(|name| keys.get(name)) {
                let text = fs::read_to_string(&value)
                    .map_err(|error| ConfigError(format!("{key} ({name}): can't read {value}: {error}")))?;
                (*key, text.trim_end_matches(['\r', '\n']).to_owned())
            } else {
                read.warnings
                    .push(format!("the environment variable {name} is no setting and is ignored"));
                continue;
            };
            if let Some((other, _)) = read.values.insert(key.clone(), (name.clone(), value)) {
                return Err(ConfigError(format!(
                    "{key}: {other} and {name} both set it; remove one of them"
                )));
            }
        }
        Ok(read)
    }
}

fn set(layers: ConfigBuilder<DefaultState>, key: &str, value: String) -> Result<ConfigBuilder<DefaultState>> {
    layers
        .set_override(key, value)
        .map_err(|error| ConfigError(format!("{key}: {error}")))
}

fn parse(text: &str, path: &Path) -> Result<Table> {
    text.parse().map_err(|error: toml::de::Error| {
        // The error's own text would quote the line, which may hold a secret.
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        ConfigError(format!(
            "{}, line {line}: {}",
            path.display(),
            error.message().replace('\n', ", ")
        ))
    })
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

/// The dotted keys of the values in `table`.
pub fn keys(table: &Table) -> Vec<String> {
    let nested = |(name, value): (&String, &Value)| match value {
        Value::Table(inner) => keys(inner).iter().map(|key| join(name, key)).collect(),
        _ => vec![name.clone()],
    };
    table.iter().flat_map(nested).collect()
}

/// The first key of `given` that has no default, or is a section where the default is a value or the other way round.
fn unknown_key(defaults: &Table, given: &Table, path: &str) -> Option<String> {
    given.iter().find_map(|(name, value)| {
        let key = join(path, name);
        match (defaults.get(name), value) {
            (Some(Value::Table(defaults)), Value::Table(given)) => unknown_key(defaults, given, &key),
            (Some(default), value) if default.is_table() == value.is_table() => None,
            (None, _) if key == ISSUERS => None,
            _ => Some(key),
        }
    })
}

/// Whether `table` sets the dotted `key`.
fn holds(table: &Table, key: &str) -> bool {
    match key.split_once('.') {
        Some((section, rest)) => table
            .get(section)
            .and_then(Value::as_table)
            .is_some_and(|table| holds(table, rest)),
        None => table.contains_key(key),
    }
}
