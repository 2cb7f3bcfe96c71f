//! How unmodified runners reach a server: the preload, `runner install` and `doctor`, with the real clients.
//!
//! The runner is played by this file: it takes its environment from its `.env`, and sets its own addresses over that at
//! each action. Those lead to a trap, which must see nobody.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::process::{Environment, PATIENCE, Process, ToItsEnd, free_port, node};
use crate::tls::Authority;

/// What a runner of GitHub Enterprise Server tells its jobs.
const GHES: &str = "https://ghes.example.com";
/// Foreign lines: without a line end, and with a NODE_OPTIONS that a user chose.
const DOT_ENV: &str = "LANG=C.UTF-8\nNODE_OPTIONS=--max-old-space-size=4096\nhttp_proxy_of=nobody";
const UPLOAD: &str = "_work/_actions/actions/upload-artifact/v7/dist/upload/index.js";
const DOWNLOAD: &str = "_work/_actions/actions/download-artifact/v8/dist/index.js";
const CACHE: &str = "_work/_actions/actions/cache/v5/dist/restore/index.js";
const OTHER: &str = "_work/_actions/docker/build-push-action/v6/dist/index.js";

/// An action that uploads or downloads an artifact with the client that it is told.
const ARTIFACT_ACTION: &str = r"
const path = require('path')
const { INPUT_CLIENT, INPUT_DO, INPUT_NAME, INPUT_PATH } = process.env
import(INPUT_CLIENT).then(async loaded => {
  const client = loaded.create || loaded.DefaultArtifactClient ? loaded : loaded.default
  const artifact = client.create ? client.create() : new client.DefaultArtifactClient()
  if (INPUT_DO === 'upload') {
    await artifact.uploadArtifact(INPUT_NAME, [INPUT_PATH], path.dirname(INPUT_PATH), {})
  } else if (client.create) {
    await artifact.downloadArtifact(INPUT_NAME, INPUT_PATH)
  } else {
    const { artifact: { id, digest } } = await artifact.getArtifact(INPUT_NAME)
    await artifact.downloadArtifact(id, { path: INPUT_PATH, expectedHash: digest })
  }
}).catch(error => { console.error(error); process.exit(1) })
";

/// An action that saves or restores a cache.
const CACHE_ACTION: &str = r"
const { INPUT_CLIENT, INPUT_DO, INPUT_NAME, INPUT_PATH } = process.env
import(INPUT_CLIENT).then(async loaded => {
  const cache = loaded.saveCache ? loaded : loaded.default
  const done = INPUT_DO === 'save' ? await cache.saveCache([INPUT_PATH], INPUT_NAME) : await cache.restoreCache([INPUT_PATH], INPUT_NAME)
  if (INPUT_DO === 'save' ? !(done > 0) : done !== INPUT_NAME) throw new Error(`${INPUT_DO}: ${done}`)
}).catch(error => { console.error(error); process.exit(1) })
";

/// An action that starts Node in every way there is; its last line is what each of them saw of its environment.
const STARTING_ACTION: &str = r"
const { execFile, execFileSync, execSync, spawn, spawnSync } = require('child_process')
const script = 'process.stdout.write(JSON.stringify(process.env))'
const args = ['-e', script]
const said = child => new Promise(resolve => {
  let text = ''
  child.stdout.on('data', chunk => { text += chunk }).on('end', () => resolve(text))
})
const node = process.execPath
const seen = {
  execFileSync: execFileSync(node, args).toString(),
  execSync: execSync(`'${node}' -e '${script}'`).toString(),
  spawnSync: spawnSync(node, args, { encoding: 'utf8', env: { ...process.env, NODE_ENV: 'test' } }).stdout,
}
import('child_process').then(async module => {
  seen.importedSync = module.spawnSync(node, args, undefined).stdout.toString()
  seen.imported = await said(module.spawn(node, args))
  seen.spawn = await said(spawn(node, args, { env: { ...process.env } }))
  seen.execFile = await new Promise(resolve => execFile(node, args, (_, stdout) => resolve(stdout)))
  for (const way of Object.keys(seen)) seen[way] = JSON.parse(seen[way])
  seen.own = process.env
  console.log(JSON.stringify(seen))
})
";

fn e2e(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e").join(path)
}

fn wharfinger(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wharfinger"));
    command.env_clear().args(arguments).stdin(Stdio::null());
    command
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Where nobody must come. Whoever does is hung up on.
struct Trap {
    port: u16,
    visits: Arc<AtomicUsize>,
    is_over: Arc<AtomicBool>,
    listening: Option<JoinHandle<()>>,
}

impl Trap {
    fn set() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (visits, is_over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counter, flag) = (Arc::clone(&visits), Arc::clone(&is_over));
        let listening = std::thread::spawn(move || {
            for _ in listener.incoming() {
                if flag.load(Ordering::SeqCst) {
                    break;
                }
                counter.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self {
            port,
            visits,
            is_over,
            listening: Some(listening),
        }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    fn visits(&self) -> usize {
        self.visits.load(Ordering::SeqCst)
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        // So that the thread looks.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.listening.take().map(JoinHandle::join);
    }
}

/// A runner's directory, and what the runner does.
struct Runner {
    directory: TempDir,
    trap: Trap,
    token: String,
    server_url: &'static str,
}

impl Runner {
    fn new(token: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runner = Self {
            directory,
            trap: Trap::set(),
            token: token.to_owned(),
            server_url: GHES,
        };
        fs::write(runner.path("config.sh"), "").unwrap();
        fs::write(runner.path(".env"), DOT_ENV).unwrap();
        for directory in ["_work/_temp", "_work/demo/demo"] {
            fs::create_dir_all(runner.path(directory)).unwrap();
        }
        for (action, script) in [
            (UPLOAD, ARTIFACT_ACTION),
            (DOWNLOAD, ARTIFACT_ACTION),
            (CACHE, CACHE_ACTION),
            (OTHER, STARTING_ACTION),
        ] {
            runner.put_action(action, script);
        }
        runner
    }

    fn installed(token: &str, url: &str, more: &[&str]) -> Self {
        let runner = Self::new(token);
        assert!(runner.install(&[&["--url", url], more].concat()).status.success());
        runner
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join(relative)
    }

    /// Writes an action's script, with the clients where it looks for them.
    fn put_action(&self, path: &str, script: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, script).unwrap();
        let modules = path.with_file_name("node_modules");
        if !modules.exists() {
            symlink(e2e("node_modules"), modules).unwrap();
        }
    }

    fn install(&self, flags: &[&str]) -> Output {
        let directory = self.directory.path().to_str().unwrap();
        wharfinger(&[&["runner", "install", directory], flags].concat()).to_its_end(PATIENCE)
    }

    fn dot_env(&self) -> String {
        fs::read_to_string(self.path(".env")).unwrap()
    }

    /// As the runner reads its `.env`: lines with a `=`, from the first to the last, whatever is behind it.
    fn environment(&self) -> BTreeMap<String, String> {
        let mut environment = BTreeMap::from([("PATH".to_owned(), std::env::var("PATH").unwrap())]);
        let text = self.dot_env();
        let lines = text.lines().filter_map(|line| line.split_once('='));
        environment.extend(lines.map(|(name, value)| (name.to_owned(), value.to_owned())));
        environment
    }

    /// A `run:` step: with what all steps get.
    fn step(&self) -> Command {
        let mut command = node();
        command
            .env_clear()
            .envs(self.environment())
            .envs([
                ("GITHUB_ACTIONS", "true"),
                ("GITHUB_ACTION", "__step"),
                ("GITHUB_REPOSITORY", "octo/demo"),
                ("GITHUB_RUN_ID", "1"),
                ("GITHUB_SERVER_URL", self.server_url),
            ])
            .env("GITHUB_WORKSPACE", self.path("_work/demo/demo"))
            .env("RUNNER_TEMP", self.path("_work/_temp"))
            .current_dir(self.path("_work/demo/demo"))
            .stdin(Stdio::null());
        command
    }

    /// The step of a JavaScript action: the runner's own addresses over everything.
    fn action(&self, path: &str) -> Command {
        let mut command = self.step();
        command.arg(self.path(path)).envs(self.runtime());
        command
    }

    fn runtime(&self) -> [(&'static str, String); 5] {
        [
            ("ACTIONS_RESULTS_URL", self.trap.url()),
            ("ACTIONS_CACHE_URL", self.trap.url()),
            ("ACTIONS_RUNTIME_URL", self.trap.url()),
            ("ACTIONS_CACHE_SERVICE_V2", "True".to_owned()),
            ("ACTIONS_RUNTIME_TOKEN", self.token.clone()),
        ]
    }

    /// Runs an action of one of the clients.
    fn client(&self, path: &str, client: &str, doing: &str, name: &str, file: &Path) -> Output {
        self.action(path)
            .env("INPUT_CLIENT", client)
            .env("INPUT_DO", doing)
            .env("INPUT_NAME", name)
            .env("INPUT_PATH", file)
            .to_its_end(PATIENCE)
    }

    /// As [`Runner::client`], for what must succeed at `url`.
    fn client_at(&self, url: &str, path: &str, client: &str, doing: &str, name: &str, file: &Path) {
        let output = self.client(path, client, doing, name, file);
        assert!(output.status.success(), "{client} {doing}: {output:?}");
        let said = stdout(&output);
        let line = format!("Wharfinger: artifacts and cache of this step go to {url}");
        assert_eq!(said.lines().filter(|said| **said == line).count(), 1, "{said}");
        assert_eq!(said.matches("Wharfinger:").count(), 1, "{said}");
    }
}

fn server() -> (TempDir, Process) {
    let directory = tempfile::tempdir().unwrap();
    let server = Process::start(&Environment::embedded(&directory.path().join("data")));
    (directory, server)
}

#[test]
fn the_preload_decides_rightly_on_every_system() {
    let output = node().arg(e2e("preload.cjs")).to_its_end(PATIENCE);
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
}

#[test]
fn unmodified_clients_get_past_the_runner() {
    let (_directory, server) = server();
    // Another job of the run downloads, on another runner.
    let build = Runner::installed(&server.token("octo/demo", "1", "build"), &server.url, &[]);
    let using = Runner::installed(&server.token("octo/demo", "1", "use"), &server.url, &[]);
    let content = "Ahoy! 港\n".repeat(1000);
    let file = build.path("_work/demo/demo/cargo.txt");
    for client in ["artifact-6.2.1", "artifact-2.1.11", "artifact-1.1.3"] {
        fs::write(&file, &content).unwrap();
        build.client_at(&server.url, UPLOAD, client, "upload", client, &file);
        let target = using.path(client);
        using.client_at(&server.url, DOWNLOAD, client, "download", client, &target);
        assert_eq!(
            fs::read_to_string(target.join("cargo.txt")).unwrap(),
            content,
            "{client}"
        );
    }
    for client in ["cache-6.3.0", "cache-4.1.0", "cache-3.3.0"] {
        fs::write(&file, &content).unwrap();
        build.client_at(&server.url, CACHE, client, "save", client, &file);
        fs::remove_file(&file).unwrap();
        build.client_at(&server.url, CACHE, client, "restore", client, &file);
        assert_eq!(fs::read_to_string(&file).unwrap(), content, "{client}");
    }
    assert_eq!((build.trap.visits(), using.trap.visits()), (0, 0));
}

/// What a process was given.
fn given(command: &Command) -> BTreeMap<String, String> {
    let text = |text: &std::ffi::OsStr| text.to_str().unwrap().to_owned();
    let given = command.get_envs();
    given.map(|(name, value)| (text(name), text(value.unwrap()))).collect()
}

/// Of an environment, what may change here; a shell adds variables of its own.
fn telling(environment: &BTreeMap<String, String>) -> BTreeMap<&str, &str> {
    let variables = environment.iter().filter(|(name, _)| {
        ["ACTIONS_", "GITHUB_", "WHARFINGER_", "NODE_OPTIONS"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
    });
    variables.map(|(name, value)| (name.as_str(), value.as_str())).collect()
}

/// By the way in which it was started: what each process saw.
fn seen(output: &Output) -> BTreeMap<String, BTreeMap<String, String>> {
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    serde_json::from_str(stdout(output).lines().next_back().unwrap()).unwrap()
}

#[test]
fn what_an_artifact_action_starts_has_the_runners_environment() {
    let runner = Runner::installed("the job's own", "https://w.example", &["--action", "octo/cache"]);
    let own = "_work/_actions/octo/cache/v1/index.js";
    for path in [UPLOAD, own] {
        runner.put_action(path, STARTING_ACTION);
        let mut command = runner.action(path);
        let given = given(&command);
        let seen = seen(&command.to_its_end(PATIENCE));
        assert_eq!(seen.len(), 8);
        for (way, seen) in seen.iter().filter(|(way, _)| *way != "own") {
            assert_eq!(telling(seen), telling(&given), "{way}");
        }
        assert_eq!(seen["spawnSync"]["NODE_ENV"], "test");
        let own = &seen["own"];
        assert_eq!(own["GITHUB_SERVER_URL"], "https://github.com");
        assert_eq!(own["ACTIONS_RESULTS_URL"], "https://w.example/");
    }
    assert_eq!(runner.trap.visits(), 0);
}

/// Docker's buildx and the like read these where they are started.
#[test]
fn what_another_action_starts_has_the_servers_addresses_and_the_forges_host() {
    let runner = Runner::installed("the job's own", "https://w.example", &[]);
    let mut command = runner.action(OTHER);
    let mut expected = given(&command);
    for name in ["ACTIONS_RESULTS_URL", "ACTIONS_CACHE_URL", "ACTIONS_RUNTIME_URL"] {
        expected.insert(name.to_owned(), "https://w.example/".to_owned());
    }
    let seen = seen(&command.to_its_end(PATIENCE));
    assert_eq!(seen.len(), 8);
    for (way, seen) in &seen {
        assert_eq!(telling(seen), telling(&expected), "{way}");
    }
}

#[test]
fn what_is_no_action_is_left_alone() {
    let runner = Runner::installed("the job's own", "https://w.example", &[]);
    let show = "process.stdout.write(JSON.stringify(process.env))";
    let script = runner.path("_work/demo/demo/build.js");
    fs::write(&script, show).unwrap();
    let run = |with_runtime: bool, arguments: &[&str]| {
        let mut command = runner.step();
        command.args(arguments);
        if with_runtime {
            command.envs(runner.runtime());
        }
        let expected = given(&command);
        let output = command.to_its_end(PATIENCE);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        // Nothing but this was said.
        let seen: BTreeMap<String, String> = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(seen, expected, "{arguments:?}");
    };
    let script = script.to_str().unwrap();
    // Some export the runtime's variables to all steps.
    for with_runtime in [false, true] {
        run(with_runtime, &["-e", show]);
        run(with_runtime, &[script]);
        run(with_runtime, &[script, "an argument"]);
    }
}

/// An action of the job's own repository, and one for which the forge is github.com.
#[test]
fn local_actions_are_redirected_and_a_good_host_stays() {
    let mut runner = Runner::installed("the job's own", "https://w.example", &[]);
    runner.server_url = "https://octo.ghe.com";
    let directory = "_work/demo/demo/.github/actions/x";
    let script = format!("{directory}/dist/index.js");
    runner.put_action(&script, STARTING_ACTION);
    fs::write(runner.path(directory).join("action.yml"), "").unwrap();
    runner.put_action(CACHE, STARTING_ACTION);
    for path in [script.as_str(), CACHE] {
        let seen = seen(&runner.action(path).to_its_end(PATIENCE));
        assert_eq!(seen["own"]["ACTIONS_RESULTS_URL"], "https://w.example/", "{path}");
        assert_eq!(seen["own"]["GITHUB_SERVER_URL"], "https://octo.ghe.com", "{path}");
    }
}

#[test]
fn a_token_that_a_hook_wrote_is_used_and_hidden() {
    let (_directory, server) = server();
    let written = tempfile::NamedTempFile::new().unwrap();
    let token_file = written.path().to_str().unwrap();
    let runner = Runner::installed("the job's own", &server.url, &["--token-file", token_file]);
    let file = runner.path("_work/demo/demo/cargo.txt");
    fs::write(&file, "cargo").unwrap();

    let output = runner.client(UPLOAD, "artifact-6.2.1", "upload", "a", &file);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let refusal = format!("::error::Wharfinger: WHARFINGER_TOKEN_FILE is empty: {token_file}\n");
    assert_eq!(stdout(&output), refusal);

    let token = server.token("octo/demo", "1", "build");
    fs::write(written.path(), format!("{token}\n")).unwrap();
    let output = runner.client(UPLOAD, "artifact-6.2.1", "upload", "a", &file);
    assert!(output.status.success(), "{output:?}");
    // As a command that the runner does not show.
    assert_eq!(
        stdout(&output).lines().next(),
        Some(format!("::add-mask::{token}").as_str())
    );
    assert_eq!(stdout(&output).matches(&token).count(), 1);
    assert_eq!(runner.trap.visits(), 0);
}

#[test]
fn without_a_server_a_step_fails_or_stays_as_it_was() {
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let stranger = Stranger::start("HTTP/1.1 200 OK", "");
    let (_directory, server) = server();
    let token = server.token("octo/demo", "1", "build");
    let run = |url: &str, fallback: &str| {
        let mut runner = Runner::installed(&token, url, &["--fallback", fallback]);
        // What stays as it was keeps its host, too.
        runner.server_url = "https://github.com";
        let file = runner.path("_work/demo/demo/cargo.txt");
        fs::write(&file, "cargo").unwrap();
        let output = runner.client(UPLOAD, "artifact-6.2.1", "upload", "a", &file);
        let said = stdout(&output);
        let ours: Vec<_> = said
            .lines()
            .filter(|line| line.contains("Wharfinger: "))
            .map(str::to_owned)
            .collect();
        (output.status.success(), ours, runner.trap.visits() > 0)
    };
    let goes_to = |url: &str| vec![format!("Wharfinger: artifacts and cache of this step go to {url}")];
    assert_eq!(run(&nobody, "fail"), (false, goes_to(&nobody), false));
    for url in [&nobody, &stranger.url] {
        let (_, said, went_elsewhere) = run(url, "original");
        let begin = format!("Wharfinger: {url}/ is not used in this step, which stays as the runner set it up: ");
        assert!(said.len() == 1 && said[0].starts_with(&begin), "{said:?}");
        assert!(went_elsewhere);
    }
    assert_eq!(run(&server.url, "original"), (true, goes_to(&server.url), false));
}

// `runner install`.

#[test]
fn installing_twice_is_installing_once_and_uninstalling_restores() {
    for before in [Some(DOT_ENV), Some("A=b\n"), Some("A=b\r\nC=d\r\n"), Some(""), None] {
        let runner = Runner::new("");
        match before {
            Some(text) => fs::write(runner.path(".env"), text).unwrap(),
            None => fs::remove_file(runner.path(".env")).unwrap(),
        }
        for _ in 0..2 {
            let flags = [
                "--url",
                "https://other.example",
                "--fallback",
                "original",
                "--token-file",
                "/t",
            ];
            assert!(runner.install(&flags).status.success());
        }
        assert!(runner.install(&["--url", "https://w.example/"]).status.success());
        let once = runner.dot_env();
        assert!(runner.install(&["--url", "https://w.example"]).status.success());
        assert_eq!(runner.dot_env(), once);
        assert!(once.starts_with(before.unwrap_or_default()));

        let environment = runner.environment();
        let preload = runner.path("wharfinger.cjs");
        let own = if before == Some(DOT_ENV) {
            "--max-old-space-size=4096 "
        } else {
            ""
        };
        assert_eq!(
            environment["NODE_OPTIONS"],
            format!("{own}--require {}", preload.display())
        );
        assert_eq!(environment["WHARFINGER_URL"], "https://w.example");
        assert_eq!(environment["WHARFINGER_FALLBACK"], "fail");
        assert!(!environment.contains_key("WHARFINGER_TOKEN_FILE"));
        let compiled_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("runner/wharfinger.cjs");
        assert_eq!(fs::read(&preload).unwrap(), fs::read(compiled_in).unwrap());

        for _ in 0..2 {
            assert!(runner.install(&["--uninstall"]).status.success());
            let left = fs::read_to_string(runner.path(".env")).ok();
            assert_eq!(left.as_deref(), before);
            assert!(!preload.exists());
        }
    }
}

#[test]
fn lines_that_came_later_stay() {
    for (before, after) in [(DOT_ENV, "LATER=x\n"), ("", "NODE_OPTIONS=--trace-warnings\n")] {
        let runner = Runner::new("");
        fs::write(runner.path(".env"), before).unwrap();
        let install = || assert!(runner.install(&["--url", "https://w.example"]).status.success());
        install();
        fs::write(runner.path(".env"), runner.dot_env() + after).unwrap();
        install();
        let options = &runner.environment()["NODE_OPTIONS"];
        let kept = if before.is_empty() {
            "--trace-warnings"
        } else {
            "--max-old-space-size=4096"
        };
        assert!(options.starts_with(&format!("{kept} --require /")), "{options}");
        assert!(runner.install(&["--uninstall"]).status.success());
        let whole_lines = if before.is_empty() {
            String::new()
        } else {
            format!("{before}\n")
        };
        assert_eq!(runner.dot_env(), whole_lines + after);
    }
}

/// Spaces are in many a runner's path on macOS and Windows.
#[test]
fn node_finds_the_preload_in_any_directory() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("my \"best\" runner\\s");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("run.cmd"), "").unwrap();
    fs::write(directory.join(".env"), "A=b\n").unwrap();
    let path = directory.to_str().unwrap();
    let output = wharfinger(&["runner", "install", path, "--url", "https://w.example"]).to_its_end(PATIENCE);
    assert!(output.status.success(), "{output:?}");
    let text = fs::read_to_string(directory.join(".env")).unwrap();
    let options = text
        .lines()
        .find_map(|line| line.strip_prefix("NODE_OPTIONS="))
        .unwrap();
    let node = node()
        .env_clear()
        .env("NODE_OPTIONS", options)
        .args(["-p", "Object.keys(require.cache).length"])
        .to_its_end(PATIENCE);
    assert_eq!(stdout(&node), "1\n", "{node:?}");
    let doctor = doctor_with(
        [("NODE_OPTIONS", options), ("WHARFINGER_URL", "https://w.example:1")],
        &[],
    );
    assert_eq!(doctor.status("preload"), "ok", "{}", doctor.report);
}

#[test]
fn mistakes_are_answered_in_one_sentence() {
    let runner = Runner::new("");
    let empty = tempfile::tempdir().unwrap();
    let empty = empty.path().to_str().unwrap();
    let said = |output: Output| {
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let output = wharfinger(&["runner", "install", empty, "--url", "https://w.example"]).to_its_end(PATIENCE);
    assert!(said(output).contains("is no runner's directory: name the one that has config.sh"));
    for url in ["w.example", "https://u:canary@w.example", "https://w.example/prefix"] {
        let said = said(runner.install(&["--url", url]));
        assert!(said.contains("must be an origin, such as https://"), "{said}");
    }
    let broken = "# Added by `wharfinger runner install`, which also removes it\nA=b\n";
    fs::write(runner.path(".env"), broken).unwrap();
    let said = said(runner.install(&["--url", "https://w.example"]));
    assert!(said.contains("by hand") && said.lines().count() == 1, "{said}");
    assert_eq!(runner.dot_env(), broken);
}

#[test]
fn images_and_pods_get_the_same() {
    let preload = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("runner/wharfinger.cjs")).unwrap();
    let print = |what: &str| {
        let flags = [
            "--url",
            "https://w.example",
            "--token-file",
            "/run/$x/t",
            "--print",
            what,
        ];
        let output = wharfinger(&[&["runner", "install"], &flags[..]].concat()).to_its_end(PATIENCE);
        assert!(output.status.success(), "{output:?}");
        stdout(&output)
    };
    let dockerfile = print("dockerfile");
    assert!(dockerfile.contains(&format!(
        "COPY <<\"PRELOAD\" /opt/wharfinger/wharfinger.cjs\n{preload}PRELOAD\n"
    )));
    assert!(dockerfile.contains("ENV NODE_OPTIONS=\"--require /opt/wharfinger/wharfinger.cjs\"\n"));
    assert!(dockerfile.contains("ENV WHARFINGER_TOKEN_FILE=\"/run/\\$x/t\"\n"));

    let parse = |text: &str| -> Value {
        let script =
            "process.stdout.write(JSON.stringify(require('yaml').parse(require('fs').readFileSync(0, 'utf8'))))";
        let mut child = node()
            .args(["-e", script])
            .current_dir(e2e(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap()
    };
    let map = parse(&print("config-map"));
    assert_eq!(map["kind"], "ConfigMap");
    assert_eq!(map["data"]["wharfinger.cjs"], preload);
    let pod = &parse(&print("pod-template"))["template"]["spec"];
    assert_eq!(pod["volumes"][0]["configMap"]["name"], map["metadata"]["name"]);
    let container = &pod["containers"][0];
    assert_eq!(container["volumeMounts"][0]["mountPath"], "/opt/wharfinger");
    assert_eq!(
        container["env"],
        json!([
            { "name": "NODE_OPTIONS", "value": "--require /opt/wharfinger/wharfinger.cjs" },
            { "name": "WHARFINGER_URL", "value": "https://w.example" },
            { "name": "WHARFINGER_FALLBACK", "value": "fail" },
            { "name": "WHARFINGER_TOKEN_FILE", "value": "/run/$x/t" },
        ])
    );
}

// `doctor`.

struct Diagnosis {
    code: i32,
    report: Value,
}

impl Diagnosis {
    fn check(&self, name: &str) -> Option<&Value> {
        self.report["checks"]
            .as_array()
            .unwrap()
            .iter()
            .find(|check| check["name"] == name)
    }

    fn status(&self, name: &str) -> &str {
        self.check(name)
            .map_or("absent", |check| check["status"].as_str().unwrap())
    }

    /// Everything is well, but for what there was nothing to try with.
    fn assert_good(&self, skipped: &[&str]) {
        assert_eq!(
            (self.code, &self.report["uses_wharfinger"]),
            (0, &json!(true)),
            "{}",
            self.report
        );
        let checks = self.report["checks"].as_array().unwrap().iter();
        let not_ok: Vec<_> = checks
            .filter(|check| check["status"] != "ok")
            .map(|check| &check["name"])
            .collect();
        assert_eq!(not_ok, skipped, "{}", self.report);
    }

    /// One thing is wrong, and what is said of it has these words.
    fn assert_fails(&self, name: &str, words: &str) {
        assert_eq!(
            (self.code, &self.report["uses_wharfinger"]),
            (1, &json!(false)),
            "{}",
            self.report
        );
        let checks = self.report["checks"].as_array().unwrap().iter();
        let failed: Vec<_> = checks.filter(|check| check["status"] == "failed").collect();
        assert!(failed.len() == 1 && failed[0]["name"] == name, "{}", self.report);
        assert!(failed[0]["detail"].as_str().unwrap().contains(words), "{}", self.report);
    }
}

fn doctor_with<N: AsRef<std::ffi::OsStr>, V: AsRef<std::ffi::OsStr>>(
    environment: impl IntoIterator<Item = (N, V)>,
    flags: &[&str],
) -> Diagnosis {
    let output = wharfinger(&[&["doctor", "--json"], flags].concat())
        .envs(environment)
        .to_its_end(PATIENCE);
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    Diagnosis {
        code: output.status.code().unwrap(),
        report,
    }
}

const NO_TOKEN: [&str; 4] = ["token", "upload", "download", "cache"];

#[tokio::test]
async fn doctor_knows_the_preload() {
    let (_directory, server) = server();
    let token = server.token("octo/demo", "1", "build");
    let runner = Runner::installed(&token, &server.url, &[]);
    let step = || runner.environment();
    // A `run:` step has no token.
    let skipped = [&["tls"], &NO_TOKEN[..]].concat();
    doctor_with(step(), &[]).assert_good(&skipped);
    // What an action starts has.
    let mut action = step();
    action.extend(runner.runtime().map(|(name, value)| (name.to_owned(), value)));
    action.insert("GITHUB_SERVER_URL".to_owned(), GHES.to_owned());
    let good = doctor_with(&action, &[]);
    good.assert_good(&["tls"]);
    assert_eq!(good.report["url"], server.url);
    assert_eq!(server.job().names().await, [""; 0], "nothing is left behind");
    assert_eq!(runner.trap.visits(), 0);
    // From outside of a job.
    let directory = runner.directory.path().to_str().unwrap();
    doctor_with([("A", "b")], &["--runner", directory]).assert_good(&skipped);

    let mut other = action.clone();
    other.insert("ACTIONS_RUNTIME_TOKEN".to_owned(), "garbage".to_owned());
    doctor_with(&other, &[]).assert_fails("token", "names no run");
    other.insert("ACTIONS_RUNTIME_TOKEN".to_owned(), format!("{token}x"));
    doctor_with(&other, &[]).assert_fails("token", "401");
    let mut other = action.clone();
    other.remove("WHARFINGER_URL");
    doctor_with(&other, &[]).assert_fails("variables", "WHARFINGER_URL is not set");
    let mut other = action.clone();
    other.insert("WHARFINGER_TOKEN_FILE".to_owned(), "/nowhere/token".to_owned());
    doctor_with(&other, &[]).assert_fails("token", "/nowhere/token");
    let mut other = action.clone();
    other.insert("WHARFINGER_URL".to_owned(), format!("http://127.0.0.1:{}", free_port()));
    doctor_with(&other, &[]).assert_fails("server", "refused");
    let mut other = action;
    other.remove("NODE_OPTIONS");
    // The runner's own variables lead elsewhere; the token does not go there.
    other.remove("GITHUB_SERVER_URL");
    let elsewhere = doctor_with(&other, &[]);
    elsewhere.assert_fails("server", "");
    assert_eq!(elsewhere.status("token"), "absent");

    fs::remove_file(runner.path("wharfinger.cjs")).unwrap();
    doctor_with(step(), &[]).assert_fails("preload", "wharfinger.cjs, which can't be read");
    let without = [("WHARFINGER_URL", &server.url)];
    doctor_with(without, &[]).assert_fails("variables", "NODE_OPTIONS does not load the preload");
    doctor_with([("A", "b")], &[]).assert_fails("variables", "nothing here leads to a server");
}

#[test]
fn doctor_knows_what_clients_read() {
    let (_directory, server) = server();
    let url = format!("{}/", server.url);
    let token = server.token("octo/demo", "1", "build");
    let with = |more: &[(&str, &str)]| {
        let mut environment = BTreeMap::from([
            ("ACTIONS_RESULTS_URL", url.as_str()),
            ("ACTIONS_CACHE_URL", &url),
            ("ACTIONS_RUNTIME_URL", &url),
            ("ACTIONS_RUNTIME_TOKEN", &token),
        ]);
        environment.extend(more.iter().copied());
        doctor_with(environment, &[])
    };
    with(&[("GITHUB_SERVER_URL", "https://github.com")]).assert_good(&["preload", "tls"]);
    with(&[("GITHUB_SERVER_URL", GHES)]).assert_fails("variables", "GitHub Enterprise Server");
    with(&[("ACTIONS_CACHE_URL", &server.url)]).assert_fails("variables", "with the slash");
    with(&[("ACTIONS_CACHE_URL", "")]).assert_fails("variables", "caches do not");
    with(&[("ACTIONS_CACHE_URL", ""), ("ACTIONS_CACHE_SERVICE_V2", "True")]).assert_good(&["preload", "tls"]);
    with(&[("ACTIONS_RESULTS_URL", "nonsense")]).assert_fails("variables", "is no URL");
}

#[test]
fn doctor_looks_at_a_server_from_outside() {
    let (directory, server) = server();
    let none = || [("A", "b")];
    doctor_with(none(), &["--url", &server.url]).assert_good(&[&["tls"], &NO_TOKEN[..]].concat());
    let token_file = directory.path().join("token");
    fs::write(&token_file, server.token("octo/demo", "1", "build")).unwrap();
    let flags = ["--url", &server.url, "--token-file", token_file.to_str().unwrap()];
    doctor_with(none(), &flags).assert_good(&["tls"]);
    let text = wharfinger(&["doctor", "--url", &server.url]).to_its_end(PATIENCE);
    let last = format!("Artifacts and caches go to Wharfinger at {}.\n", server.url);
    assert!(stdout(&text).ends_with(&last), "{text:?}");

    // A label may have 63 characters, so this name has no address anywhere.
    let unknown = format!("http://{}.example", "a".repeat(64));
    doctor_with(none(), &["--url", &unknown]).assert_fails("dns", "has no address");
    let stranger = Stranger::start("HTTP/1.1 200 OK", r#"{"name":"other"}"#);
    doctor_with(none(), &["--url", &stranger.url]).assert_fails("server", "is no Wharfinger");
    let ours = r#"{"name":"wharfinger","version":"0"}"#;
    let late = Stranger::start("HTTP/1.1 200 OK\r\ndate: Sun, 06 Nov 1994 08:49:37 GMT", ours);
    doctor_with(none(), &["--url", &late.url]).assert_fails("clock", "s apart");
}

#[test]
fn doctor_trusts_whom_node_trusts() {
    let authority = Authority::new();
    authority.sign(&["127.0.0.1"]);
    let port = free_port();
    let url = format!("https://127.0.0.1:{port}");
    let mut environment = authority.environment(&url);
    environment.set("WHARFINGER_LISTEN", format!("127.0.0.1:{port}"));
    let server = Process::start(&environment);
    let token = server.token("octo/demo", "1", "build");
    let ca_file = authority.ca_file();
    let known = [
        ("NODE_EXTRA_CA_CERTS", ca_file.to_str().unwrap()),
        ("ACTIONS_RUNTIME_TOKEN", &token),
    ];
    doctor_with(known, &["--url", &url]).assert_good(&[]);
    doctor_with([("A", "b")], &["--url", &url]).assert_fails("tls", "NODE_EXTRA_CA_CERTS");
    let missing = [("NODE_EXTRA_CA_CERTS", "/nowhere.pem")];
    doctor_with(missing, &["--url", &url]).assert_fails("tls", "/nowhere.pem");

    // And Node does, before it leaves a step as it was.
    let runner = Runner::installed(&token, &url, &["--fallback", "original"]);
    for (environment, is_used) in [(&known[..1], true), (&[], false)] {
        let output = runner
            .action(OTHER)
            .envs(environment.iter().copied())
            .to_its_end(PATIENCE);
        let line = format!("Wharfinger: artifacts and cache of this step go to {url}\n");
        assert_eq!(stdout(&output).contains(&line), is_used, "{output:?}");
    }
}

/// A server that is no Wharfinger: the same answer to everything.
struct Stranger {
    url: String,
    is_over: Arc<AtomicBool>,
    answering: Option<JoinHandle<()>>,
}

impl Stranger {
    fn start(head: &'static str, body: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let is_over = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&is_over);
        let answering = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if flag.load(Ordering::SeqCst) {
                    break;
                }
                let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                // All of the head, lest what was not read resets the connection.
                lines.by_ref().take_while(|line| !line.is_empty()).for_each(drop);
                let length = body.len();
                let _ = write!(
                    &stream,
                    "{head}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
                );
            }
        });
        Self {
            url,
            is_over,
            answering: Some(answering),
        }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.url.strip_prefix("http://").unwrap());
        let _ = self.answering.take().map(JoinHandle::join);
    }
}
