use super::role::run_role;
use super::*;
use crate::config::{Config, ConfigError, ImsConfig, Log, McsConfig, RelayConfig};

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn wrong_usage_has_exit_code_2() {
    for line in [
        "roamcast",
        "roamcast agent",
        "roamcast relay",
        "roamcast ims",
        "roamcast ims enroll nonsense --config f",
        "roamcast ims enroll fd00::1 --config f --generation 0",
        "roamcast ims --check list --config f",
        "roamcast listeners extra",
        "roamcast migrate one",
        "roamcast trace --address nonsense",
        "roamcast trace --address 192.0.2.1",
        "roamcast trace --program nonsense",
        "roamcast trace --rate 0",
        "roamcast pki issue dir name --days 0",
        "roamcast pki issue dir name --address nonsense",
        "roamcast pki issue dir name --role root",
        "roamcast pki issue dir name --role Agent",
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn listeners_take_json_and_a_socket() {
    let cli = parse("roamcast listeners --json --socket /x").unwrap();
    let Command::Listeners(args) = cli.command else {
        panic!("another command");
    };
    assert!(args.json);
    assert_eq!(args.socket.socket, Path::new("/x"));
}

#[test]
fn trace_takes_conditions() {
    let cli = parse("roamcast trace --port vnet0 --address ff1e::1 --program gate --program agent")
        .unwrap();
    let Command::Trace(args) = cli.command else {
        panic!("another command");
    };
    assert_eq!(args.port.as_deref(), Some("vnet0"));
    assert_eq!(args.address, Some("ff1e::1".parse().unwrap()));
    assert_eq!(args.programs, ["gate", "agent"]);
    assert_eq!(args.rate, 1000);
}

#[test]
fn completions_name_the_commands() {
    let mut out = Vec::new();
    completions(Shell::Bash, &mut out);
    assert!(String::from_utf8(out).unwrap().contains("migrations"));
}

#[test]
fn manual_has_a_page_for_each_command() {
    let directory = tempfile::tempdir().unwrap();
    manual(directory.path()).unwrap();
    for page in [
        "roamcast.1",
        "roamcast-agent.1",
        "roamcast-pki-issue.1",
        "roamcast-trace.1",
        "roamcast-ims-enroll.1",
    ] {
        assert!(directory.path().join(page).exists(), "{page}");
    }
}

/// Runs a role with `--check` on a configuration file with the given content.
fn check<C>(
    text: &str,
    load: impl FnOnce(&Path) -> Result<C, ConfigError>,
    log: impl FnOnce(&C) -> &Log,
) -> anyhow::Result<String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("role.toml");
    std::fs::write(&path, text).unwrap();
    let args = RoleArgs {
        config: path,
        check: true,
    };
    let mut out = Vec::new();
    run_role(
        &args,
        load,
        log,
        |_| Vec::new(),
        |_| panic!("started"),
        &mut out,
    )?;
    Ok(String::from_utf8(out).unwrap())
}

#[test]
fn check_says_ok_to_the_example_of_each_role_and_starts_nothing() {
    let agent = include_str!("../../dist/roamcast.toml");
    let relay = include_str!("../../dist/relay.toml");
    let mcs = include_str!("../../dist/mcs.toml");
    let ims = include_str!("../../dist/ims.toml");
    assert_eq!(check(agent, Config::load, |it| &it.log).unwrap(), "OK\n");
    assert_eq!(
        check(relay, RelayConfig::load, |it| &it.log).unwrap(),
        "OK\n"
    );
    assert_eq!(check(mcs, McsConfig::load, |it| &it.log).unwrap(), "OK\n");
    assert_eq!(check(ims, ImsConfig::load, |it| &it.log).unwrap(), "OK\n");
    let error = check(relay, Config::load, |it| &it.log).expect_err("accepted");
    assert!(error.to_string().contains("role.toml:"), "{error}");
}

#[test]
fn check_refuses_a_log_level_that_is_none() {
    let text = "[agent]\nname = \"a\"\nbridge = \"b\"\n[log]\nlevel = \"a=loud\"\n";
    let error = check(text, Config::load, |it| &it.log).expect_err("accepted");
    assert!(error.to_string().contains("a=loud"), "{error}");
}

#[test]
fn refusal_of_the_agent_is_printed_verbatim() {
    let refused = CommandError::from(ClientError::Refused("Domain \"a\" is moving".to_owned()));
    assert_eq!(describe(&refused.into()), "Domain \"a\" is moving");
}

#[test]
fn hook_takes_whatever_libvirt_passes() {
    for line in [
        "roamcast hook run",
        "roamcast hook run --socket /x -- -name migrate begin -",
        "roamcast hook run -- viewer migrate begin - more",
        "roamcast hook run viewer prepare begin -",
    ] {
        parse(line).expect(line);
    }
    let cli = parse("roamcast hook run --socket /x -- --socket migrate begin -").unwrap();
    let Command::Hook {
        command: HookCommand::Run { socket, arguments },
    } = cli.command
    else {
        panic!("another command");
    };
    assert_eq!(socket.socket, Path::new("/x"));
    assert!(crate::hook::run::concerns(&arguments), "{arguments:?}");
}

#[test]
fn mapping_server_runs_unless_it_is_told_what_else_to_do() {
    let role = |line| match parse(line).expect(line).command {
        Command::Ims(args) => args,
        other => panic!("{other:?}"),
    };
    let args = role("roamcast ims --config f --check");
    assert!(args.command.is_none() && args.role.is_some_and(|role| role.check));
    let args = role("roamcast ims enroll fd00::1 --config f --servers [::1]:1,[::1]:2");
    let Some(ImsCommand::Enroll(args)) = args.command else {
        panic!("another command");
    };
    assert_eq!((args.servers.len(), args.output), (2, None));
    for line in [
        "roamcast ims init --config f",
        "roamcast ims list --config f --json",
    ] {
        assert!(role(line).command.is_some(), "{line}");
    }
}

#[test]
fn cleanup_is_of_the_agent_unless_another_pin_root_is_named() {
    let root = |line| match parse(line).expect(line).command {
        Command::Cleanup { pin_root } => pin_root,
        other => panic!("{other:?}"),
    };
    assert_eq!(root("roamcast cleanup"), Path::new(DEFAULT_PIN_ROOT));
    assert_eq!(root("roamcast cleanup --pin-root /x"), Path::new("/x"));
}
