//! An S3 server inside the test process, over a temporary directory; or a part of the one that
//! `tests/with-seaweedfs.sh` started.
//!
//! For tests of `storage` and of whole servers. It has threads of its own, so that large bodies don't wait for the
//! test's runtime, and it may be used from a test of any flavour.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// Stops, and takes its directory away, when dropped; what lies on a server outside goes with that.
pub struct S3Server {
    /// `http://127.0.0.1:port`, for path-style requests.
    pub endpoint: String,
    /// A bucket that is there already; on a server outside with a prefix that nobody else uses.
    pub bucket: &'static str,
    pub access_key_id: &'static str,
    pub secret_access_key: &'static str,
    directory: Option<TempDir>,
    runtime: Option<Runtime>,
}

impl S3Server {
    pub fn start() -> Self {
        Self::outside().unwrap_or_else(Self::inside)
    }

    /// The server that the environment names, if it names one.
    pub fn outside() -> Option<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let endpoint = std::env::var("WHARFINGER_TEST_S3_ENDPOINT").ok()?;
        // They are as good as constants, and never many.
        let variable = |name: &str| -> &'static str {
            let value = std::env::var(format!("WHARFINGER_TEST_S3_{name}"));
            value.expect("with-seaweedfs.sh sets them all").leak()
        };
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let bucket = format!("{}/t{}_{count}", variable("BUCKET"), std::process::id());
        Some(Self {
            endpoint,
            bucket: bucket.leak(),
            access_key_id: variable("ACCESS_KEY_ID"),
            secret_access_key: variable("SECRET_ACCESS_KEY"),
            directory: None,
            runtime: None,
        })
    }

    /// A server of this process, whatever the environment says.
    pub fn inside() -> Self {
        let (bucket, access_key_id, secret_access_key) = ("wharf", "test-access-key", "test-secret-key");
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join(bucket)).unwrap();
        let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(directory.path()).unwrap());
        service.set_auth(SimpleAuth::from_single(access_key_id, secret_access_key));
        let service = service.build();

        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                // Otherwise each object read waits 40 ms for an acknowledgement.
                socket.set_nodelay(true).unwrap();
                let service = service.clone();
                tokio::spawn(async move {
                    // A client may cut the connection; that is its business.
                    let mut server = http1::Builder::new();
                    server.timer(TokioTimer::new());
                    let _ = server.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self {
            endpoint,
            bucket,
            access_key_id,
            secret_access_key,
            directory: Some(directory),
            runtime: Some(runtime),
        }
    }

    /// Where the objects of the bucket are files, named by their keys; `None` on a server outside.
    pub fn bucket_directory(&self) -> Option<PathBuf> {
        Some(self.directory.as_ref()?.path().join(self.bucket))
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // An ordinary drop would wait, which is forbidden in async code.
            runtime.shutdown_background();
        }
    }
}
