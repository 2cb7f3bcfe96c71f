//! Unit tests of the configuration: what each layer says, what wins, what is refused and how that is told.

use super::layers::DEFAULTS;
use std::time::Duration;

use super::*;
use crate::papers::IssuerKind;
use crate::storage::Durability;

struct Attempt {
    directory: tempfile::TempDir,
    flags: Overrides,
    environment: Vec<(String, String)>,
}

impl Attempt {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            flags: Overrides::default(),
            environment: Vec::new(),
        }
    }

    fn file(mut self, text: &str) -> Self {
        self.flags.file = Some(self.write("wharfinger.toml", text));
        self
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    fn flag(mut self, key: &'static str, value: &str) -> Self {
        self.flags.values.push((key, value.to_owned()));
        self
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn load(self) -> Loaded {
        Config::load(&self.flags, self.environment).unwrap()
    }

    fn error(self) -> String {
        let error = Config::load(&self.flags, self.environment).unwrap_err().to_string();
        assert!(!error.contains('\n') && !error.contains("canary"), "{error}");
        error
    }
}

#[track_caller]
fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn the_defaults_are_complete_and_valid() {
    let Loaded { config, warnings, .. } = Attempt::new().load();
    assert_eq!(warnings, [""; 0]);
    assert_eq!(config.listen, "127.0.0.1:8080".parse().unwrap());
    assert_eq!(config.public_origin(), "http://127.0.0.1:8080");
    assert_eq!(
        config.root_secret_file(),
        RootSecretFile::Embedded("data/root.secret".into())
    );
    assert_eq!(config.log.format, LogFormat::Auto);
    assert_eq!(config.storage.durability, Durability::Full);
    assert!(config.storage.path_style);
    assert_eq!(config.uploads.max_block_bytes, 256 * 1024 * 1024);
    assert_eq!(config.uploads.max_put_blob_bytes, 5000 * 1024 * 1024);
    assert_eq!(config.artifacts.default_retention, Duration::from_secs(90 * 86_400));
    assert!(config.issuers.is_empty());
}

#[test]
fn the_issuer_example_works_when_its_comments_are_taken_off() {
    let example = DEFAULTS.split_once("# [[issuers]]").unwrap().1.replace("\n# ", "\n");
    let Loaded { config, .. } = Attempt::new().file(&format!("[[issuers]]{example}")).load();
    let [gitea, ghes, forge, github] = config.issuers.as_slice() else {
        panic!("four issuers")
    };
    assert_eq!(gitea.iss.as_deref(), Some("https://gitea.example.com"));
    assert_eq!(gitea.max_lifetime, Duration::from_secs(86_400));
    assert_eq!((ghes.kind, forge.kind), (IssuerKind::Jwks, IssuerKind::Jwks));
    assert!(ghes.jwks_url.is_some() && forge.jwks_file.is_some());
    assert_eq!(github.kind, IssuerKind::GithubRuntime);
    assert_eq!(github.allowed_owner_ids.as_deref(), Some(&[583_231][..]));
}

#[test]
fn a_copy_of_the_reference_is_a_valid_file() {
    Attempt::new().file(DEFAULTS).load();
}

#[test]
fn later_layers_win() {
    let file = "data_dir = \"file\"\nlisten = \"127.0.0.1:1\"\n[log]\nlevel = \"warn\"\n";
    let attempt = || Attempt::new().file(file);
    let file_only = attempt().load().config;
    assert_eq!(
        (file_only.data_dir, file_only.log.level.as_str()),
        ("file".into(), "warn")
    );
    assert_eq!(file_only.internal_listen.port(), 9090);
    let variable = attempt().variable("WHARFINGER_DATA_DIR", "variable");
    assert_eq!(variable.load().config.data_dir, Path::new("variable"));
    let flag = attempt()
        .variable("WHARFINGER_DATA_DIR", "variable")
        .flag("data_dir", "flag");
    assert_eq!(flag.load().config.data_dir, Path::new("flag"));
}

#[test]
fn the_environment_names_the_file_unless_a_flag_does() {
    let attempt = Attempt::new();
    let path = attempt.write("from-environment.toml", "data_dir = \"environment\"");
    let attempt = attempt.variable("WHARFINGER_CONFIG", path.to_str().unwrap());
    let flag = attempt.flags.clone();
    assert_eq!(
        Config::load(&flag, attempt.environment.clone())
            .unwrap()
            .config
            .data_dir,
        Path::new("environment")
    );
    assert_eq!(
        attempt.file("data_dir = \"flag\"").load().config.data_dir,
        Path::new("flag")
    );
    let error = Attempt::new().variable("WHARFINGER_CONFIG", "/no/such/file").error();
    assert_has(&error, &["/no/such/file", "configuration file"]);
}

#[test]
fn unknown_keys_in_the_file_are_refused() {
    for (text, key) in [
        ("databse = 1", "databse"),
        ("[bogus]", "bogus"),
        ("[server]\ndrain = \"1s\"", "server.drain"),
        ("log = \"debug\"", "log"),
        ("listen.port = 1", "listen"),
        ("[issuer]\nname = \"x\"", "issuer"),
        ("Listen = \"127.0.0.1:1\"", "Listen"),
    ] {
        assert_has(
            &Attempt::new().file(text).error(),
            &[&format!("unknown key {key} in "), "wharfinger.toml"],
        );
    }
    let issuer = "[[issuers]]\nname = \"x\"\nkind = \"hs256\"\nsecret_file = \"s\"\niss = \"i\"\n";
    Attempt::new().file(issuer).load();
    let error = Attempt::new().file(&format!("{issuer}colour = \"red\"")).error();
    assert_has(&error, &["issuers[0]", "colour", "wharfinger.toml"]);
    let error = Attempt::new().file("[[issuers]]\nname = \"x\"").error();
    assert_has(&error, &["issuers[0].", "is missing", "wharfinger.toml"]);
}

#[test]
fn a_file_that_is_no_toml_is_refused_without_quoting_it() {
    let error = Attempt::new()
        .file("listen = \"127.0.0.1:1\"\n[storage]\nsecret_access_key = \"canary")
        .error();
    assert_has(&error, &["wharfinger.toml, line 3: "]);
    assert!(!error.contains("canary"), "{error}");
}

#[test]
fn variables_have_the_types_of_their_keys() {
    let Loaded {
        config,
        warnings,
        effective_toml,
    } = Attempt::new()
        .variable("WHARFINGER_INTERNAL_LISTEN", "[::1]:9091")
        .variable("WHARFINGER_DATABASE__MAX_CONNECTIONS", "7")
        .variable("WHARFINGER_STORAGE__PATH_STYLE", "false")
        .variable("WHARFINGER_STORAGE__DURABILITY", "process")
        .variable("WHARFINGER_SERVER__DRAIN_DELAY", "0s")
        .variable("WHARFINGER_UPLOADS__MAX_PUT_BLOB_BYTES", "5368709120")
        .load();
    assert_eq!(warnings, [""; 0]);
    assert_eq!(config.internal_listen, "[::1]:9091".parse().unwrap());
    assert_eq!(config.database.max_connections, 7);
    assert!(!config.storage.path_style);
    assert_eq!(config.storage.durability, Durability::Process);
    assert_eq!(config.server.drain_delay, Duration::ZERO);
    assert_eq!(config.uploads.max_put_blob_bytes, 5_368_709_120);
    assert_has(&effective_toml, &["max_connections = 7\n", "path_style = false\n"]);
}

#[test]
fn a_wrong_value_names_where_it_was_set() {
    let variable = |name, value| Attempt::new().variable(name, value).error();
    assert_has(
        &variable("WHARFINGER_DATABASE__MAX_CONNECTIONS", "many"),
        &[
            "database.max_connections",
            "WHARFINGER_DATABASE__MAX_CONNECTIONS",
            "an integer",
            "many",
        ],
    );
    assert_has(
        &variable("WHARFINGER_DATABASE__MAX_CONNECTIONS", "-1"),
        &["WHARFINGER_DATABASE__MAX_CONNECTIONS"],
    );
    assert_has(
        &variable("WHARFINGER_STORAGE__PATH_STYLE", "maybe"),
        &["storage.path_style", "a boolean"],
    );
    assert_has(
        &variable("WHARFINGER_UPLOADS__LINK_TTL", "6"),
        &["uploads.link_ttl", "such as 90s, 6h or 30d"],
    );
    assert_has(
        &variable("WHARFINGER_STORAGE__DURABILITY", "none"),
        &["storage.durability", "\"none\" is not one of its words"],
    );
    assert_has(
        &Attempt::new().flag("log.format", "xml").error(),
        &["log.format (--log-format): \"xml\" is not"],
    );
    assert_has(
        &Attempt::new().flag("listen", "localhost:8080").error(),
        &[
            "listen (--listen): ",
            "an IP address and a port, such as 127.0.0.1:8080",
        ],
    );
    assert_has(
        &Attempt::new().file("[cleaner]\ninterval = 60").error(),
        &["cleaner.interval (", "wharfinger.toml): ", "is not a duration"],
    );
}

#[test]
fn values_can_come_from_files() {
    let attempt = Attempt::new();
    let url = attempt.write("url", "postgres://w:canary@db/w\n");
    let root = attempt.write("root", "");
    let config = attempt
        .variable("WHARFINGER_DATABASE__URL_FILE", url.to_str().unwrap())
        .variable("WHARFINGER_SECRET_FILE", root.to_str().unwrap())
        .load()
        .config;
    assert_eq!(config.database.url.expose_secret(), "postgres://w:canary@db/w");
    // A key that is itself called so keeps its plain meaning.
    assert_eq!(config.root_secret_file(), RootSecretFile::Given(root));

    let error = Attempt::new()
        .variable("WHARFINGER_DATABASE__URL_FILE", "/no/such/file")
        .error();
    assert_has(
        &error,
        &["database.url (WHARFINGER_DATABASE__URL_FILE)", "/no/such/file"],
    );
    let error = Attempt::new()
        .variable("WHARFINGER_DATABASE__URL", "")
        .variable("WHARFINGER_DATABASE__URL_FILE", "/dev/null")
        .error();
    assert_has(
        &error,
        &[
            "WHARFINGER_DATABASE__URL and WHARFINGER_DATABASE__URL_FILE",
            "remove one",
        ],
    );
}

#[test]
fn variables_that_are_no_settings_warn() {
    let warnings = Attempt::new()
        .variable("WHARFINGER_PORT", "tcp://10.0.0.1:8080")
        .variable("WHARFINGER_ISSUERS", "[]")
        .variable("WHARFINGER_SERVER", "x")
        .variable("WHARFINGER_listen", "x")
        .variable("OTHER", "x")
        .load()
        .warnings;
    for name in [
        "WHARFINGER_PORT",
        "WHARFINGER_ISSUERS",
        "WHARFINGER_SERVER",
        "WHARFINGER_listen",
    ] {
        assert!(
            warnings
                .iter()
                .any(|warning| warning.contains(&format!("variable {name} is"))),
            "{warnings:?}"
        );
    }
    assert_eq!(warnings.len(), 4);
}

#[test]
fn public_url_is_an_origin() {
    let load = |url| Attempt::new().flag("public_url", url);
    assert_eq!(
        load("https://a.example.com/").load().config.public_origin(),
        "https://a.example.com"
    );
    for url in [
        "a.example.com",
        "ftp://a.example.com",
        "https://a/b",
        "https://u@a",
        "https://a?q",
        "https://a#f",
    ] {
        assert_has(
            &load(url).error(),
            &["public_url (--public-url): ", "https://artifacts.example.com"],
        );
    }
    assert_has(
        &Attempt::new().flag("listen", "0.0.0.0:8080").error(),
        &["public_url: ", "0.0.0.0:8080"],
    );
    let listen = Attempt::new()
        .flag("listen", "0.0.0.0:8080")
        .flag("public_url", "http://runner-net:8080");
    assert_eq!(listen.load().config.public_origin(), "http://runner-net:8080");
}

#[test]
fn the_two_listeners_differ() {
    assert_has(
        &Attempt::new().flag("internal_listen", "127.0.0.1:8080").error(),
        &["internal_listen", "same"],
    );
    Attempt::new()
        .flag("listen", "127.0.0.1:0")
        .flag("internal_listen", "127.0.0.1:0")
        .load();
}

#[test]
fn places_are_checked() {
    let flag = |key, value| Attempt::new().flag(key, value);
    for url in ["mysql://host/db", "host:5432", "sqlite://x"] {
        assert_has(
            &flag("database.url", url).error(),
            &["database.url (--database-url): ", "postgres://"],
        );
    }
    assert_has(
        &flag("database.url", "postgres://u:canary@h/d").error(),
        &["secret_file: ", "openssl rand -hex 32"],
    );
    let both = flag("database.url", "postgresql://u@h/d")
        .flag("secret_file", "s")
        .flag("storage.url", "s3://b/p");
    assert_eq!(both.load().config.storage.url, "s3://b/p");
    for url in ["s3://", "s3:///p", "s3://b?x", "s3://id:canary@b", "gs://b", "/var/lib"] {
        assert_has(
            &flag("storage.url", url).error(),
            &["storage.url (--storage-url): ", "s3://bucket"],
        );
    }
    flag("storage.url", "memory://").load();
    for endpoint in ["s3.example.com", "http://u:p@h", "https://h?x"] {
        assert_has(
            &flag("storage.endpoint", endpoint).error(),
            &["storage.endpoint", "https://"],
        );
    }
    flag("storage.endpoint", "http://127.0.0.1:8333").load();
    assert_has(
        &flag("storage.access_key_id", "id").error(),
        &["storage.access_key_id", "both, or neither"],
    );
    assert_has(
        &flag("ca_file", "/no/such/file").error(),
        &["ca_file", "can't read /no/such/file"],
    );
    assert_has(&flag("data_dir", "").error(), &["data_dir"]);
}

#[test]
fn trusted_proxies_are_addresses_and_networks() {
    let networks = |attempt: Attempt| {
        let loaded = attempt.load();
        let networks = loaded.config.server.trusted_proxies;
        networks.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(networks(Attempt::new()), [""; 0]);
    let file = "[server]\ntrusted_proxies = [\"10.0.0.7\", \"2001:db8::/32\"]";
    assert_eq!(networks(Attempt::new().file(file)), ["10.0.0.7/32", "2001:db8::/32"]);
    let variable = |value| Attempt::new().variable("WHARFINGER_SERVER__TRUSTED_PROXIES", value);
    assert_eq!(networks(variable("10.0.0.7, ::1")), ["10.0.0.7/32", "::1/128"]);
    assert_eq!(networks(variable("")), [""; 0]);
    assert_has(
        &variable("10.0.0.0/8,proxy.example").error(),
        &[
            "server.trusted_proxies",
            "WHARFINGER_SERVER__TRUSTED_PROXIES",
            "\"proxy.example\"",
            "10.0.0.0/8",
        ],
    );
    let shown = Attempt::new().file(file).load().effective_toml;
    assert!(
        shown.contains("trusted_proxies = [\"10.0.0.7\", \"2001:db8::/32\"]"),
        "{shown}"
    );
}

#[test]
fn limits_are_checked() {
    let flag = |key, value| Attempt::new().flag(key, value);
    assert_has(
        &flag("server.idle_timeout", "0s").error(),
        &["server.idle_timeout", "longer than 0s"],
    );
    for batch in ["0", "1001"] {
        assert_has(
            &flag("cleaner.batch", batch).error(),
            &["cleaner.batch", "at least 1 and at most 1000"],
        );
    }
    assert_has(
        &flag("artifacts.max_retention", "30d").error(),
        &["artifacts.default_retention", "max_retention"],
    );
    assert_has(
        &flag("uploads.link_ttl", "2d").error(),
        &["uploads.abandoned_after", "link_ttl"],
    );
    for key in ["server.drain_delay", "server.drain_timeout", "cleaner.delete_grace"] {
        flag(key, "0s").load();
    }
    flag("verification.inline_max_bytes", "0").load();
}

#[test]
fn a_log_filter_with_a_typing_error_is_refused() {
    for filter in ["inof", "", "info,wharfinger", "wharfinger=loud", "[[["] {
        assert_has(
            &Attempt::new().flag("log.level", filter).error(),
            &["log.level (--log-level): ", "debug"],
        );
    }
    for filter in ["info", "WARN", "info,wharfinger::storage=debug", "off"] {
        Attempt::new().flag("log.level", filter).load();
    }
}

#[test]
fn secrets_are_never_shown() {
    let Loaded {
        config, effective_toml, ..
    } = Attempt::new()
        .file("[[issuers]]\nname = \"x\"\nkind = \"hs256\"\nsecret_file = \"s\"\niss = \"i\"\n")
        .variable("WHARFINGER_SECRET_FILE", "/etc/root")
        .variable(
            "WHARFINGER_DATABASE__URL",
            "postgres://w:canary@db:5432/w?sslmode=require&password=canary",
        )
        .variable("WHARFINGER_STORAGE__ACCESS_KEY_ID", "id")
        .variable("WHARFINGER_STORAGE__SECRET_ACCESS_KEY", "canary")
        .variable("WHARFINGER_STORAGE__SESSION_TOKEN", "canary")
        .load();
    let debug = format!("{config:?}");
    assert!(!debug.contains("canary"), "{debug}");
    assert!(!effective_toml.contains("canary"), "{effective_toml}");
    assert_has(
        &effective_toml,
        &[
            "\"postgres://w:***@db:5432/w?sslmode=require&password=***\"",
            "secret_access_key = \"***\"",
            "/etc/root",
        ],
    );
    let shown: toml::Table = effective_toml.parse().unwrap();
    assert_eq!(shown["public_url"].as_str(), Some("http://127.0.0.1:8080"));
    assert_eq!(shown["issuers"][0]["name"].as_str(), Some("x"));
    assert_eq!(
        layers::keys(&shown).len(),
        layers::keys(&DEFAULTS.parse().unwrap()).len() + 1
    );
}

#[test]
fn passwords_in_urls_are_hidden() {
    for (url, shown) in [
        ("", ""),
        ("postgres://h/d", "postgres://h/d"),
        ("postgres://h:5432/d", "postgres://h:5432/d"),
        ("postgres://u@h:5432/d", "postgres://u@h:5432/d"),
        ("postgres://u:p@h:5432/d", "postgres://u:***@h:5432/d"),
        ("postgres://u:p@s/s?w:@h/d", "postgres://u:***@h/d"),
        ("postgres:///d?user=u&password=p", "postgres:///d?user=u&password=***"),
        ("u:p@h", "***"),
    ] {
        assert_eq!(redact_url(url), shown);
    }
}
