# shellcheck shell=bash
# A folder with all that the lesson needs, for a classroom without network: catnap, the image, the scripts, and an
# emulator with its libraries for machines without KVM. Sourced by scripts/lesson, after common.sh.
#
#   FOLDER/lesson            what to run
#   FOLDER/.bundle           tells the scripts that nothing is to be built or fetched
#   FOLDER/scripts, target   as in the project, as far as they are needed
#   FOLDER/lab               the lab's kernel and userland
#   FOLDER/bin, lib          programs that a fresh machine may lack, with their libraries
# shellcheck source=common.sh disable=SC2154
# shellcheck source=lab-files.sh
. "$root/scripts/lib/lab-files.sh"

# Of QEMU's firmware, what a machine without a screen needs.
firmware="bios-256k.bin kvmvapic.bin linuxboot.bin linuxboot_dma.bin"

# make_bundle FOLDER: it appears when it is whole.
make_bundle() {
    local folder new
    ! bundled || die 2 "this is a bundle already: copy its folder"
    [ ! -e "$1" ] || [ -z "$(ls -A "$1")" ] || die 4 "$1 is not empty
try: another folder"
    mkdir -p "$1"
    folder=$(realpath "$1")
    new=$folder/.new
    need qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils mke2fs=e2fsprogs curl=curl flock=util-linux
    say "1. Building what goes in …"
    build_catnap
    build_guest
    build_kitten "$home"
    fetch_emulator
    fetch_packages
    say "2. Filling $folder …"
    rm -rf "$new"
    mkdir -p "$new"/{bin,lib/modules,lib/firmware,lab}
    copy_project "$new"
    cp "$downloads/vmlinuz" "$new/lab/"
    make_initramfs "$root/target/guest/x86_64-unknown-linux-gnu/release/catnap-guest" "$new/lab/initramfs"
    rm -f "$new/lab/initramfs.log"
    pack_emulator "$new"
    pack_program mke2fs "$new"
    pack_program curl "$new"
    ! (need docker-registry=docker-registry) 2>/dev/null || pack_program docker-registry "$new"
    cat >"$new/lesson" <<'END'
#!/bin/sh
exec "$(dirname "$0")/scripts/lesson" "$@"
END
    chmod 755 "$new/lesson"
    : >"$new/.bundle"
    mv "$new"/* "$new/.bundle" "$folder/"
    rmdir "$new"
    sync
    say "Done: $(du -sh "$folder" | cut -f1). Copy the folder to a disk of the machine (not a stick, which has no hard
links), and run there: ./lesson"
}

copy_project() {
    mkdir -p "$1/target/lesson-home" "$1/${target#"$root/"}/release" "$1/target/guest/x86_64-unknown-linux-gnu/release"
    cp -r "$root/scripts" "$1/"
    cp "$target/release/catnap" "$1/${target#"$root/"}/release/"
    cp "$root/target/guest/x86_64-unknown-linux-gnu/release/catnap-guest" "$1/target/guest/x86_64-unknown-linux-gnu/release/"
    mkdir -p "$1/target/lesson-home/data"
    cp -r "$home/data/snapshots" "$home/data/names" "$1/target/lesson-home/data/"
    keep_images "$1/target/lesson-home/data"
    cp "$home/made-by" "$1/target/lesson-home/"
    cp "$root"/LICENSE-* "$root/README.md" "$1/"
    mkdir -p "$1/docs" && cp "$root"/docs/*.md "$1/docs/"
}

# keep_images DATA: what the lesson has made before is not carried along.
keep_images() {
    local name digest
    for name in "$1"/names/*@*; do rm -f "$name"; done
    for digest in "$1"/snapshots/*; do
        grep -qsF "${digest##*/}" "$1"/names/* || { chmod -R u+w "$digest" && rm -rf "$digest"; }
    done
}

# pack_program NAME FOLDER: a program, its libraries and the loader that finds them, so that it runs on a machine that
# has others.
pack_program() {
    local program
    program=$(PATH=$PATH:/usr/sbin:/sbin command -v "$1")
    cp -L "$program" "$2/lib/$1"
    copy_libraries "$program" "$2/lib"
    cat >"$2/bin/$1" <<END
#!/bin/sh
here=\$(cd "\$(dirname "\$0")/.." && pwd)
exec "\$here/lib/ld-linux-x86-64.so.2" --library-path "\$here/lib" "\$here/lib/$1" "\$@"
END
    chmod 755 "$2/bin/$1"
}

copy_libraries() {
    local file
    for file in $(ldd "$1" | grep -o '/[^ ]*'); do
        [ -e "$2/${file##*/}" ] || cp -L "$file" "$2/"
    done
}

# The emulator that the lab uses here, with its modules and firmware.
pack_emulator() {
    local program=$emulator/usr/bin/qemu-system-x86_64 module name place
    # What is first in the PATH may be somebody's script around the program.
    ldd "$program" >/dev/null 2>&1 || die 5 "qemu-system-x86_64 is no program that can be packed"
    cp "$program" "$1/lib/"
    copy_libraries "$program" "$1/lib"
    for module in "$emulator"/usr/lib/*/qemu/accel-tcg-x86_64.so; do
        [ -e "$module" ] || continue
        cp "$module" "$1/lib/modules/"
        copy_libraries "$module" "$1/lib"
    done
    for name in $firmware; do
        for place in "$emulator/usr/share/qemu" "$emulator/usr/share/seabios" /usr/share/qemu /usr/share/seabios; do
            [ ! -e "$place/$name" ] || { cp -L "$place/$name" "$1/lib/firmware/" && break; }
        done
    done
    cat >"$1/bin/qemu-system-x86_64" <<'END'
#!/bin/sh
here=$(cd "$(dirname "$0")/.." && pwd)
export QEMU_MODULE_DIR="$here/lib/modules"
exec "$here/lib/ld-linux-x86-64.so.2" --library-path "$here/lib" "$here/lib/qemu-system-x86_64" -L "$here/lib/firmware" "$@"
END
    chmod 755 "$1/bin/qemu-system-x86_64"
}
