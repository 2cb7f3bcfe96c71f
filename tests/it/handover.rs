//! Restarts under load with sockets that somebody else holds, as systemd does: no client notices.

use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::common::client::{Runner, Status, run_client};
use super::common::process::{Environment, Process};

const RESTARTS: usize = 3;

/// The sockets, and duplicates of them that a child inherits.
struct Sockets {
    listeners: [TcpListener; 2],
    inherited: [OwnedFd; 2],
}

impl Sockets {
    fn bind() -> Self {
        let listeners = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let inherited = listeners.each_ref().map(|listener| rustix::io::dup(listener).unwrap());
        Self { listeners, inherited }
    }

    fn environment(&self, data_dir: &Path) -> Environment {
        let mut environment = Environment::embedded(data_dir);
        let [public, internal] = self.listeners.each_ref().map(|listener| listener.local_addr().unwrap());
        environment.set("WHARFINGER_LISTEN", public);
        environment.set("WHARFINGER_INTERNAL_LISTEN", internal);
        environment
    }

    /// A server that is given the sockets as systemd gives them: from descriptor 3 on.
    fn start(&self, environment: &Environment) -> Process {
        let [public, internal] = self.inherited.each_ref().map(AsRawFd::as_raw_fd);
        let mut command = Command::new("bash");
        environment.apply(&mut command);
        command
            .arg("-euc")
            .arg(format!(
                "exec 3<&{public} 4<&{internal} {public}<&- {internal}<&-; \
                 LISTEN_FDS=2 LISTEN_PID=$$ exec \"$0\" serve --log-format json"
            ))
            .arg(env!("CARGO_BIN_EXE_wharfinger"))
            .stdin(Stdio::null());
        Process::start_by(command, environment.clone())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_under_load_fails_no_client() {
    let directory = tempfile::tempdir().unwrap();
    let sockets = Sockets::bind();
    let environment = sockets.environment(&directory.path().join("data"));
    let mut server = sockets.start(&environment);

    let stop = Arc::new(AtomicBool::new(false));
    let clients = [
        ("artifact-6.2.1", "small,tree"),
        ("artifact-2.1.11", "small"),
        ("cache-6.3.0-v2", "exact,prefix"),
    ]
    .map(|(client, cases)| {
        let runner = Runner {
            url: server.url.clone(),
            token: server.token("octo/demo", client, "build"),
            variables: Vec::new(),
        };
        let stop = Arc::clone(&stop);
        tokio::task::spawn_blocking(move || {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                for outcome in run_client(&runner, client, cases) {
                    assert_eq!(outcome.status, Status::Ok, "{outcome:#?}");
                }
                rounds += 1;
            }
            rounds
        })
    });
    // What one client does in a row, each request on a connection of its own.
    let job = server.job().keeping_no_connections();
    let in_a_row = {
        let stop = Arc::clone(&stop);
        tokio::spawn(async move {
            let mut done = 0;
            while !stop.load(Ordering::Relaxed) {
                let name = format!("in a row {done}");
                let link = job.create(&name).await;
                assert_eq!(job.put(&link, 4, "1234").await.unwrap(), 201);
                job.finalize(&name, 4).await;
                assert_eq!(job.download(&name).await, b"1234");
                done += 1;
            }
            done
        })
    };
    for _ in 0..RESTARTS {
        // Some of the way, and then the end: the next one takes the sockets over with whoever waits in them.
        let before = log_lines(&server);
        while log_lines(&server) < before + 100 {
            tokio::task::yield_now().await;
        }
        server = tokio::task::block_in_place(|| {
            assert_eq!(server.terminate(), Some(0));
            sockets.start(&environment)
        });
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
    assert!(in_a_row.await.unwrap() > 0);
    assert_eq!(server.terminate(), Some(0));
}

fn log_lines(server: &Process) -> usize {
    server.log.lock().unwrap().len()
}
