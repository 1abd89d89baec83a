//! A registry of containers, Debian's, on a port of the loopback.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::{PATIENCE, home, net, within};

/// A registry with a folder of its own. Both go with this value.
pub struct Registry {
    port: u16,
    folder: PathBuf,
    process: Child,
}

impl Registry {
    pub fn start() -> Registry {
        let (port, folder) = (net::free_port(), home().with_file_name("registry"));
        // A test that was killed has left it behind.
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("a folder");
        let config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n",
            folder.join("storage").display()
        );
        fs::write(folder.join("config.yml"), config).expect("a file");
        let program =
            std::env::var_os("CATNAP_TEST_REGISTRY").expect("CATNAP_TEST_REGISTRY; scripts/test guest sets it");
        let mut command = Command::new(program);
        command.arg("serve").arg(folder.join("config.yml")).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("a registry starts");
        let registry = Registry { port, folder, process };
        within(PATIENCE, "the registry answers", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        registry
    }

    /// Where something with this tag is, or will be.
    pub fn at(&self, tag: &str) -> String {
        format!("localhost:{}/cats/anna:{tag}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
