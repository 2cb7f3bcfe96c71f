//! `wharfinger env`: prints the variables that clients read, as `export` lines for `eval`.

use std::io::{self, Write as _};

use super::token::MintFlags;
use crate::app;
use crate::config::Config;

pub async fn run(config: &Config, flags: MintFlags) -> anyhow::Result<()> {
    let papers = app::papers(config).await?;
    let token = flags.mint(&papers)?;
    io::stdout()
        .lock()
        .write_all(exports(papers.public_url(), &token, &flags).as_bytes())?;
    Ok(())
}

fn exports(public_url: &str, token: &str, flags: &MintFlags) -> String {
    let url = format!("{public_url}/");
    let attempt = flags.attempt.to_string();
    let variables = [
        ("ACTIONS_RESULTS_URL", url.as_str()),
        // Clients put paths behind these two without a slash between.
        ("ACTIONS_RUNTIME_URL", &url),
        ("ACTIONS_CACHE_URL", &url),
        // The cache clients take version 2 of the protocol if this is set, and Go's if it is true.
        ("ACTIONS_CACHE_SERVICE_V2", "True"),
        ("ACTIONS_RUNTIME_TOKEN", token),
        // Not where the server is: clients give up before the first request if this names any other host.
        ("GITHUB_SERVER_URL", "https://github.com"),
        ("GITHUB_REPOSITORY", &flags.repository),
        ("GITHUB_RUN_ID", &flags.run_id),
        ("GITHUB_RUN_ATTEMPT", &attempt),
        ("GITHUB_JOB", &flags.job_id),
    ];
    let mut lines: String = variables
        .into_iter()
        .map(|(name, value)| format!("export {name}={}\n", quoted(value)))
        .collect();
    // Where downloads go that name no directory.
    lines.push_str("export GITHUB_WORKSPACE=\"${GITHUB_WORKSPACE:-$PWD}\"\n");
    lines
}

/// For a POSIX shell, whatever is in `text`.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    fn flags(job_id: &str) -> MintFlags {
        MintFlags {
            repository: "octo/demo".to_owned(),
            run_id: "7".to_owned(),
            job_id: job_id.to_owned(),
            repository_id: None,
            attempt: 2,
            git_ref: "refs/heads/main".to_owned(),
            default_ref: "refs/heads/main".to_owned(),
            event: None,
            ttl: Duration::from_secs(60),
        }
    }

    fn shell(script: &str) -> String {
        let output = Command::new("sh")
            .args(["-euc", script])
            .env_clear()
            .env("PWD", "/")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn a_shell_takes_the_lines() {
        let lines = exports("https://a.example.com", "x.y.z", &flags("build"));
        assert!(lines.lines().all(|line| line.starts_with("export ")));
        // Also when the quotes around the substitution are forgotten and the line ends are lost.
        for lines in [lines.clone(), lines.replace('\n', " ")] {
            let values = shell(&format!(
                "{lines}\nprintf '%s %s %s %s %s %s %s %s' $ACTIONS_RESULTS_URL $ACTIONS_RUNTIME_URL \
                 $ACTIONS_RUNTIME_TOKEN $GITHUB_SERVER_URL $GITHUB_REPOSITORY $GITHUB_RUN_ID $GITHUB_RUN_ATTEMPT \
                 $GITHUB_JOB"
            ));
            assert_eq!(
                values,
                "https://a.example.com/ https://a.example.com/ x.y.z https://github.com octo/demo 7 2 build"
            );
            assert_eq!(
                shell(&format!(
                    "{lines}\nprintf '%s %s' $ACTIONS_CACHE_URL $ACTIONS_CACHE_SERVICE_V2"
                )),
                "https://a.example.com/ True"
            );
        }
    }

    #[test]
    fn the_workspace_is_kept_or_is_here() {
        let lines = exports("https://a.example.com", "x.y.z", &flags("build"));
        let here = shell("printf %s \"$PWD\"");
        assert_eq!(shell(&format!("{lines}\nprintf %s \"$GITHUB_WORKSPACE\"")), here);
        assert_eq!(
            shell(&format!(
                "GITHUB_WORKSPACE=/work\n{lines}\nprintf %s \"$GITHUB_WORKSPACE\""
            )),
            "/work"
        );
    }

    #[test]
    fn nothing_escapes_the_quotes() {
        for text in [
            "",
            "a b",
            "it's",
            "'; exit 1; '",
            "$(exit 1)",
            "`exit 1`",
            "\\",
            "a\nb",
            "\"$HOME\"",
        ] {
            assert_eq!(shell(&format!("printf %s {}", quoted(text))), text);
        }
    }
}
