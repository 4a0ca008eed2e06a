//! Which of a crate's targets a fuzz binary runs.

/// A target: its name, and what takes an input and panics if something does not hold.
pub type Target = (&'static str, fn(&[u8]));

/// Variable of the environment with the name of the target. libFuzzer takes all arguments for its own.
pub const VARIABLE: &str = "ROAMCAST_FUZZ_TARGET";

/// The target that the environment names. Without a name, prints all of them and ends the process.
pub fn chosen(targets: &[Target]) -> fn(&[u8]) {
    let Ok(wanted) = std::env::var(VARIABLE) else {
        for (name, _) in targets {
            println!("{name}");
        }
        std::process::exit(0);
    };
    let found = targets.iter().find(|(name, _)| *name == wanted);
    match found {
        Some((_, run)) => *run,
        None => {
            eprintln!("There is no target {wanted} here");
            std::process::exit(2);
        }
    }
}

/// The whole of a fuzz binary.
#[macro_export]
macro_rules! binary {
    ($targets:expr) => {
        static CHOSEN: std::sync::OnceLock<fn(&[u8])> = std::sync::OnceLock::new();

        libfuzzer_sys::fuzz_target!(
            init: {
                let _ = CHOSEN.set($crate::chosen($targets));
            },
            |data: &[u8]| {
                if let Some(run) = CHOSEN.get() {
                    run(data);
                }
            }
        );
    };
}
