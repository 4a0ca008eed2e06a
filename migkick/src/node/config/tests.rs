use super::*;
use proptest::prelude::*;

const GOOD: &str = r#"
hoa = "fd5e:6d61:74::5"
generation = 1
key = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
home = "fd5e:6d61:74::/48"
servers = ["[2001:db8::1]:47413", "[2001:db8:1::1]:47413"]
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("node.toml"), text)
}

#[test]
fn key_file_is_read() {
    let config = parse(GOOD).unwrap();
    assert_eq!(
        config.identity.home,
        ("fd5e:6d61:74::".parse().unwrap(), 48)
    );
    assert_eq!(config.identity.servers.len(), 2);
    assert_eq!(config.identity.key.0[1], 0x11);
    assert_eq!(config.lifetime, Duration::from_secs(600));
    assert!(config.neutral);
}

#[test]
fn example_is_valid_but_for_its_key() {
    let example = include_str!("../../../dist/node.toml");
    let error = parse(example).expect_err("parsed");
    assert!(error.to_string().contains("`key`"), "{error}");
    let digits = "5".repeat(64);
    let text = example.replace("<64 hexadecimal digits>", &digits);
    parse(&text).unwrap();
    // The lines in comments are the defaults.
    let all = text.replace("\n#", "\n");
    let all: String = all
        .lines()
        .filter(|it| it.contains(" = "))
        .fold(String::new(), |all, it| all + it + "\n");
    let (one, other) = (parse(&text).unwrap(), parse(&all).unwrap());
    assert_eq!(
        (one.lifetime, one.forward, one.state),
        (other.lifetime, other.forward, other.state)
    );
}

#[test]
fn every_error_names_the_key_and_what_to_do() {
    let digits = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
    for (from, to, key, hint) in [
        ("fd5e:6d61:74::5", "fd5e:6d61:75::5", "`hoa`", "correct one"),
        ("fd5e:6d61:74::5", "nowhere", "`hoa`", "IPv6"),
        ("generation = 1", "generation = 0", "`generation`", "enroll"),
        ("generation = 1", "generation = -1", "`generation`", "u32"),
        (digits, "00", "`key`", "64 hexadecimal digits"),
        (
            digits,
            &format!("+{}", &digits[1..]),
            "`key`",
            "64 hexadecimal digits",
        ),
        ("::/48", "::/0", "`home`", "prefix"),
        ("::/48", "::5/48", "`home`", "prefix"),
        ("::/48", "::/129", "`home`", "prefix"),
        (
            "[\"[2001:db8::1]:47413\", \"[2001:db8:1::1]:47413\"]",
            "[]",
            "`servers`",
            "at least one",
        ),
        ("[2001:db8:1::1]", "[2001:db8::1]", "`servers`", "twice"),
        ("[2001:db8:1::1]", "[::]", "`servers`", "correct"),
        (
            "[2001:db8:1::1]",
            "[fd5e:6d61:74::1]",
            "`servers`",
            "own address",
        ),
        (
            "[2001:db8:1::1]:47413",
            "2001:db8:1::1",
            "`servers`",
            "socket address",
        ),
        (
            "generation = 1",
            "generation = 1\nlifetime_s = 1",
            "`lifetime_s`",
            "from 30",
        ),
        (
            "generation = 1",
            "generation = 1\nforward_s = 0",
            "`forward_s`",
            "from 1",
        ),
        (
            "generation = 1",
            "generation = 1\nrouters = [\"fe80::1\"]",
            "`routers`",
            "global",
        ),
        (
            "generation = 1",
            "generation = 1\nlifetimes = 1",
            "`lifetimes`",
            "unknown field",
        ),
        ("generation = 1", "", "generation", "missing"),
    ] {
        let text = GOOD.replace(from, to);
        assert_ne!(text, GOOD);
        let error = parse(&text).expect_err(to).to_string();
        assert!(error.contains(key) && error.contains(hint), "{to}: {error}");
        assert!(!error.contains(&digits[..32]), "{error}");
    }
}

#[test]
fn file_that_others_can_read_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("node.toml");
    std::fs::write(&path, GOOD).unwrap();
    let set =
        |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    set(0o644);
    let error = Config::read(&path).expect_err("read").to_string();
    assert!(error.contains("chmod 600"), "{error}");
    set(0o600);
    Config::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let error = Config::read(&path).expect_err("read").to_string();
    assert!(error.contains("--config"), "{error}");
}

proptest! {
    #[test]
    fn any_text_is_refused_or_read(text in "(hoa|key|home|servers|[a-z_]{1,9}) = [\"\\[\\]0-9a-f:./]{0,60}\n?") {
        let _ = parse(&text);
        let _ = parse(&(GOOD.to_owned() + &text));
    }
}
