//! Refusals of programs and maps, in one line for a person.

use std::error::Error;
use std::fs;

use super::link::chain;

/// Number of lines of the verifier's log that are kept. The log may have megabytes, and the reason is at
/// its end.
const LOG_LINES: usize = 6;
/// Release of the running kernel, as `uname -r` prints it.
const RELEASE: &str = "/proc/sys/kernel/osrelease";

/// Returns one line with the name of what the kernel refused, the kernel's release, and the reason.
pub fn refusal(name: &str, error: &dyn Error) -> String {
    let release = fs::read_to_string(RELEASE).unwrap_or_default();
    line(name, release.trim(), &chain(error))
}

fn line(name: &str, release: &str, reason: &str) -> String {
    let lines: Vec<&str> = reason.lines().collect();
    let tail = lines.get(lines.len().saturating_sub(LOG_LINES)..);
    match (lines.first(), tail) {
        (Some(first), Some(tail)) if lines.len() > LOG_LINES => {
            format!("{name} on Linux {release}: {first} .. {}", tail.join(" "))
        }
        _ => format!("{name} on Linux {release}: {}", lines.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_names_the_program_the_kernel_and_the_end_of_the_verifiers_log() {
        let log: Vec<String> = (0..100).map(|number| format!("{number}: r0 = 0")).collect();
        let reason = format!("the BPF_PROG_LOAD syscall failed\n{}", log.join("\n"));
        assert_eq!(
            line("snoop", "6.1.0-44-amd64", &reason),
            "snoop on Linux 6.1.0-44-amd64: the BPF_PROG_LOAD syscall failed .. 94: r0 = 0 \
             95: r0 = 0 96: r0 = 0 97: r0 = 0 98: r0 = 0 99: r0 = 0"
        );
    }

    #[test]
    fn refusal_is_one_line_and_has_the_running_kernel() {
        let error = std::io::Error::other("not permitted\nat all");
        let text = refusal("gate", &error);
        assert!(text.starts_with("gate on Linux "), "{text}");
        assert!(text.ends_with(": not permitted at all"), "{text}");
        assert!(!text.contains("Linux :"), "{text}");
    }
}
