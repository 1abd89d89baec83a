//! The `catnap` program: everything is in the library, so that the tests and the fuzz targets reach it too.

fn main() -> std::process::ExitCode {
    catnap::cli::main()
}
