//! `wharfinger runner install`: puts the preload, and the variables that it reads, where an unmodified runner hands them
//! to its jobs; or prints the same for images and for Kubernetes.
//!
//! Called by `cli`, without a server's configuration. Never touches what the runner replaces when it updates itself
//! (`bin/`, `externals/`), nor a line of its `.env` that is not ours.

use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};
use reqwest::Url;
use serde_json::json;

/// What Node processes of jobs load first.
pub const PRELOAD: &str = include_str!("../../runner/wharfinger.cjs");
const PRELOAD_NAME: &str = "wharfinger.cjs";
/// Where images have the preload.
const IN_IMAGES: &str = "/opt/wharfinger/wharfinger.cjs";

// Our lines of a runner's `.env`. The runner passes over lines without `=`, and of several for one variable takes the
// last: so ours stand at the end, and an older NODE_OPTIONS stays where it is.
const BEGIN: &str = "# Added by `wharfinger runner install`, which also removes it";
/// Behind [`BEGIN`]: there was no `.env`.
const NEW_FILE: &str = " with this file";
/// Behind [`BEGIN`]: the line before had no end.
const LINE_END: &str = " with the line end before";
const END: &str = "# Until here";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Let the jobs of a runner on this machine use a server, or print what images and Kubernetes need for it
    Install(InstallFlags),
}

#[derive(Args, Debug)]
pub struct InstallFlags {
    /// The runner's directory, where its config.sh is
    #[arg(value_name = "DIRECTORY", required_unless_present = "print")]
    directory: Option<PathBuf>,
    /// The server's origin, such as https://artifacts.example.com
    #[arg(
        long,
        value_name = "URL",
        required_unless_present = "uninstall",
        value_parser = origin
    )]
    url: Option<String>,
    /// What a step does when no Wharfinger answers: fail, or use what the runner set it up for
    #[arg(long, value_enum, default_value_t = Fallback::Fail)]
    fallback: Fallback,
    /// A file with a runtime token for each job, in place of the job's own
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// One more action that uses artifacts or caches, such as octo/cache or octo/*; may be given several times
    #[arg(long = "action", value_name = "OWNER/NAME")]
    actions: Vec<String>,
    /// Take it all back
    #[arg(long, conflicts_with_all = ["url", "print"])]
    uninstall: bool,
    /// Change nothing here, and print what does the same
    #[arg(long, value_enum, conflicts_with = "directory")]
    print: Option<Print>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Fallback {
    Fail,
    Original,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Print {
    /// Lines of a Dockerfile
    Dockerfile,
    /// A ConfigMap with the preload, for `kubectl apply`
    ConfigMap,
    /// Values of the chart gha-runner-scale-set, for pods that mount it
    PodTemplate,
}

pub fn run(Command::Install(mut flags): Command) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if flags.print.is_none() {
        flags.token_file = flags.token_file.map(std::path::absolute).transpose()?;
    }
    match (&flags.directory, flags.print) {
        (_, Some(Print::Dockerfile)) => write!(out, "{}", flags.dockerfile())?,
        (_, Some(Print::ConfigMap)) => write!(out, "{}", config_map())?,
        (_, Some(Print::PodTemplate)) => write!(out, "{}", flags.pod_template())?,
        (Some(directory), None) => {
            let runner = Runner::at(directory)?;
            let said = if flags.uninstall {
                runner.uninstall()?
            } else {
                runner.install(&flags)?
            };
            writeln!(out, "{said}")?;
        }
        // Refused where flags are read.
        (None, None) => bail!("name the runner's directory"),
    }
    Ok(())
}

/// An origin as clients need it: they drop a path.
pub fn origin(text: &str) -> anyhow::Result<String> {
    let url = Url::parse(text).ok().filter(|url| {
        let origin = url.origin();
        matches!(url.scheme(), "http" | "https") && url.as_str() == format!("{}/", origin.ascii_serialization())
    });
    // The text is not repeated: it may hold a password.
    let url = url.context("the URL must be an origin, such as https://artifacts.example.com")?;
    Ok(url.origin().ascii_serialization())
}

impl InstallFlags {
    /// The variables of a runner, with the preload at `path`, behind what NODE_OPTIONS is already.
    fn variables(&self, path: &str, node_options: &str) -> Vec<(&'static str, String)> {
        let mut variables = vec![
            ("NODE_OPTIONS", with_preload(node_options, path)),
            ("WHARFINGER_URL", self.url.clone().unwrap_or_default()),
            (
                "WHARFINGER_FALLBACK",
                match self.fallback {
                    Fallback::Fail => "fail",
                    Fallback::Original => "original",
                }
                .to_owned(),
            ),
        ];
        if let Some(file) = &self.token_file {
            variables.push(("WHARFINGER_TOKEN_FILE", file.display().to_string()));
        }
        if !self.actions.is_empty() {
            variables.push(("WHARFINGER_ACTIONS", self.actions.join(",")));
        }
        variables
    }

    fn dockerfile(&self) -> String {
        let mut text = format!(
            "# Into the image of the runner, and into those of job containers.\n\
             COPY <<\"PRELOAD\" {IN_IMAGES}\n{PRELOAD}PRELOAD\n"
        );
        for (name, value) in self.variables(IN_IMAGES, "") {
            let value = json!(value).to_string().replace('$', "\\$");
            text.push_str(&format!("ENV {name}={value}\n"));
        }
        text
    }

    fn pod_template(&self) -> String {
        let env: String = self
            .variables(IN_IMAGES, "")
            .into_iter()
            .map(|(name, value)| format!("          - name: {name}\n            value: {}\n", json!(value)))
            .collect();
        format!(
            "# Values of the chart gha-runner-scale-set.\n\
             template:\n  spec:\n    containers:\n      - name: runner\n        \
             image: ghcr.io/actions/actions-runner:latest\n        \
             command: [\"/home/runner/run.sh\"]\n        env:\n{env}        volumeMounts:\n          \
             - name: wharfinger\n            mountPath: /opt/wharfinger\n            readOnly: true\n    \
             volumes:\n      - name: wharfinger\n        configMap:\n          name: wharfinger\n"
        )
    }
}

fn config_map() -> String {
    let indented: String = PRELOAD
        .lines()
        .map(|line| {
            if line.is_empty() {
                "\n".to_owned()
            } else {
                format!("    {line}\n")
            }
        })
        .collect();
    format!("apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: wharfinger\ndata:\n  {PRELOAD_NAME}: |\n{indented}")
}

/// A runner's directory: what its config.sh made.
struct Runner {
    preload: PathBuf,
    env: PathBuf,
}

impl Runner {
    fn at(directory: &Path) -> anyhow::Result<Self> {
        let name = directory.display();
        let directory = std::path::absolute(directory).with_context(|| format!("can't tell where {name} is"))?;
        ensure!(
            ["config.sh", "config.cmd", "run.sh", "run.cmd"]
                .iter()
                .any(|file| directory.join(file).exists()),
            "{name} is no runner's directory: name the one that has config.sh in it"
        );
        Ok(Self {
            preload: directory.join(PRELOAD_NAME),
            env: directory.join(".env"),
        })
    }

    fn install(&self, flags: &InstallFlags) -> anyhow::Result<String> {
        let path = self.preload.to_str();
        let path = path.with_context(|| format!("{} is not UTF-8: move the runner", self.preload.display()))?;
        let existing = read(&self.env)?;
        let Foreign { text, is_new } = Foreign::of(existing.as_deref(), &self.env)?;
        let begin = if is_new {
            format!("{BEGIN}{NEW_FILE}\n")
        } else if !text.is_empty() && !text.ends_with('\n') {
            format!("\n{BEGIN}{LINE_END}\n")
        } else {
            format!("{BEGIN}\n")
        };
        let node_options = value_of(&text, "NODE_OPTIONS").unwrap_or_default();
        let mut lines = String::new();
        for (name, value) in flags.variables(path, node_options) {
            ensure!(!value.contains(['\r', '\n']), "{name} can't have a line end in it");
            lines.push_str(&format!("{name}={value}\n"));
        }
        // First what is named, then what names it: without its file, every Node process of a job would fail.
        write(&self.preload, PRELOAD)?;
        write(&self.env, &format!("{text}{begin}{lines}{END}\n"))?;
        Ok(format!(
            "{} names {path}: restart the runner, which reads it when it starts",
            self.env.display()
        ))
    }

    fn uninstall(&self) -> anyhow::Result<String> {
        let existing = read(&self.env)?;
        let Foreign { text, is_new } = Foreign::of(existing.as_deref(), &self.env)?;
        if is_new {
            remove(&self.env)?;
        } else {
            write(&self.env, &text)?;
        }
        let is_ours = |text: &String| text.lines().next() == PRELOAD.lines().next();
        if read(&self.preload)?.as_ref().is_some_and(is_ours) {
            remove(&self.preload)?;
        }
        Ok(format!(
            "{} is as it was: restart the runner, which reads it when it starts",
            self.env.display()
        ))
    }
}

/// A runner's `.env` without our lines.
struct Foreign {
    text: String,
    /// Without ours there would be no such file.
    is_new: bool,
}

impl Foreign {
    fn of(existing: Option<&str>, path: &Path) -> anyhow::Result<Self> {
        let Some(existing) = existing else {
            return Ok(Self {
                text: String::new(),
                is_new: true,
            });
        };
        let Some(start) = line_starting_with(existing, BEGIN) else {
            return Ok(Self {
                text: existing.to_owned(),
                is_new: false,
            });
        };
        let (before, ours) = existing.split_at(start);
        let Some((ours, after)) = ours.split_once(&format!("\n{END}\n")) else {
            bail!(
                "{} has the line {BEGIN:?} without {END:?} behind it: remove what lies between by hand",
                path.display()
            );
        };
        let head = ours.lines().next().unwrap_or_default();
        // What was written behind our lines needs the line end.
        let before = match before.strip_suffix('\n') {
            Some(line) if head.ends_with(LINE_END) && after.is_empty() => line,
            _ => before,
        };
        let text = format!("{before}{after}");
        Ok(Self {
            is_new: text.is_empty() && head.ends_with(NEW_FILE),
            text,
        })
    }
}

fn line_starting_with(text: &str, beginning: &str) -> Option<usize> {
    if text.starts_with(beginning) {
        return Some(0);
    }
    text.find(&format!("\n{beginning}")).map(|at| at + 1)
}

/// What a runner takes from its `.env`: the last line for a variable, as it stands.
pub fn value_of<'a>(env: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.strip_prefix(name)?.strip_prefix('=');
    env.lines().filter_map(value).next_back()
}

/// NODE_OPTIONS that load the preload, too.
fn with_preload(node_options: &str, path: &str) -> String {
    if preloads(node_options).iter().any(|other| other == path) {
        return node_options.to_owned();
    }
    // A backslash outside of quotes is one.
    let path = if path.contains([' ', '"']) {
        format!("\"{}\"", path.replace('\\', "\\\\").replace('"', "\\\""))
    } else {
        path.to_owned()
    };
    format!("{node_options} --require {path}").trim_start().to_owned()
}

/// The files that NODE_OPTIONS loads first.
pub fn preloads(node_options: &str) -> Vec<String> {
    let words = words(node_options);
    let mut words = words.iter();
    let mut found = Vec::new();
    while let Some(word) = words.next() {
        if word == "--require" || word == "-r" {
            found.extend(words.next().cloned());
        } else if let Some(path) = word.strip_prefix("--require=") {
            found.push(path.to_owned());
        }
    }
    found
}

/// As Node splits them: at spaces, but not within double quotes, where a backslash takes the next character as it is.
fn words(node_options: &str) -> Vec<String> {
    let (mut words, mut word, mut is_quoted) = (Vec::new(), String::new(), false);
    let mut characters = node_options.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => is_quoted = !is_quoted,
            '\\' if is_quoted => word.extend(characters.next()),
            ' ' if !is_quoted => words.push(std::mem::take(&mut word)),
            character => word.push(character),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

/// A file's text, if there is one.
pub fn read(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("can't read {}", path.display())),
    }
}

/// In place, so that owner and permissions stay; and only what differs.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if read(path)?.as_deref() == Some(text) {
        return Ok(());
    }
    fs::write(path, text).with_context(|| format!("can't write {}: run this as the runner's user", path.display()))
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("can't remove {}: run this as the runner's user", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_options_are_split_as_node_does() {
        for path in [
            "/opt/actions-runner/wharfinger.cjs",
            "/Users/ci/my runner/wharfinger.cjs",
            r"C:\actions-runner\wharfinger.cjs",
            r"C:\my runner\wharfinger.cjs",
        ] {
            for before in ["", "--max-old-space-size=4096", "--require=./a.cjs -r \"b c.cjs\""] {
                let options = with_preload(before, path);
                assert!(options.starts_with(before), "{options}");
                assert_eq!(preloads(&options).last().map(String::as_str), Some(path));
                // Once is enough.
                assert_eq!(with_preload(&options, path), options);
            }
        }
        assert_eq!(
            preloads("--require=./a.cjs -r \"b c.cjs\" --require"),
            ["./a.cjs", "b c.cjs"]
        );
    }

    #[test]
    fn the_last_line_for_a_variable_counts() {
        let env = "A=1\n#A=2\nAB=3\nA=4=5 \n";
        assert_eq!(value_of(env, "A"), Some("4=5 "));
        assert_eq!(value_of(env, "B"), None);
    }
}
