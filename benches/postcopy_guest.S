# A guest that is all of its firmware: it fills 256 MiB behind its first 4 MiB, says `.` on the debug console, and then writes to one
# page of it after another, in no order.
.code16
.globl _start
_start:
    cli
    lgdtl %cs:gdtr
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $8, $0xf0000 + protected
.code32
protected:
    movw $16, %ax
    movw %ax, %ds
    # Words that no codec makes much smaller, and no two pages alike.
    movl $0x400000, %ecx
    movl $1, %eax
1:  movl %eax, %edx
    shll $13, %edx
    xorl %edx, %eax
    movl %eax, %edx
    shrl $17, %edx
    xorl %edx, %eax
    movl %eax, %edx
    shll $5, %edx
    xorl %edx, %eax
    movl %eax, (%ecx)
    addl $4, %ecx
    cmpl $0x10400000, %ecx
    jb 1b
    movb $'.', %al
    outb %al, $0xe9
    movl $1, %ebx
write:
    imull $1664525, %ebx, %ebx
    addl $1013904223, %ebx
    movl %ebx, %ecx
    shrl $16, %ecx
    shll $12, %ecx
    incl 0x400000(%ecx)
    jmp write
.balign 8
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr: .word 23
    .long 0xf0000 + gdt
.org 0xfff0
.code16
    ljmp $0xf000, $_start
.org 0xfffe
    .word 0
