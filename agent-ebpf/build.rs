//! Options of the linker for the kernel programs.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Block placement moves the head of a loop behind its end, so that the end falls through to the
    // head. Older kernels, 6.1 among them, refuse every loop that is closed by a fall-through.
    if std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "bpf") {
        println!("cargo::rustc-link-arg-bins=--llvm-args=-disable-block-placement");
    }
}
