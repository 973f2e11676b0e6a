-- db_notes.sql: databases and SQL, in notes that run
--
-- A lesson from the first CREATE to the last DROP, in the world of our file server: students put
-- and get files, and every transfer is written down. It follows the second half of the article
-- https://www.cnblogs.com/Vee-Wang/p/7231705.html and tries what it says on real engines.
--
-- Read it top to bottom, or run it, as often as you like; it sweeps up behind itself:
--     sqlite3 -echo < db_notes.sql      SQLite 3.25 or later; name no database file: it works in memory
--     mariadb -vvv < db_notes.sql       MariaDB 10.5 or later, as root or another who may create users
--     mysql -vvv < db_notes.sql         MySQL 8.0.16 or later, likewise
--     psql -a < db_notes.sql            PostgreSQL 10 or later, as postgres or another superuser
-- or with nothing but Python: README.md has the line, which shows each statement and its rows.
-- On a server the names db_notes_lesson and db_notes_student are ours: they are dropped, then made.
--
-- What stands beneath a statement is a promise, and the tests hold each engine to it:
--     SELECT 7 / 2;                 a statement: it runs
--     -- > 3                        a row of its answer; | stands between columns
--     -- > mariadb: 3.5             another answer, on this engine: sqlite, mariadb or postgresql
--     -- try: SELEC 7;              not run, as it fails on some engine: paste the notes down to here at the
--                                   engine's prompt, then type it
--     -- ! mariadb 1064             what comes of that: MariaDB's error number, PostgreSQL's SQLSTATE,
--                                   the exception of Python's sqlite3; or ok, when it passes
-- MySQL answers as MariaDB does, except where the text says otherwise (so its manual tells: MySQL is
-- the one engine that the tests do not run).


-- ==== 1. Words ===================================================================================
-- Database (DB): data kept for a long time, organised by a model (here: tables), with little
-- redundancy, independent of the programs that use it, and shared by many users.
--
-- Database management system (DBMS): the software that creates, uses and guards databases. You
-- think of students and files; it deals with pages on a disk, and keeps the data safe and whole
-- while many read and write at once. Oracle, IBM's DB2, SQL Server, Access and MySQL (open source,
-- free, cross-platform) are the article's list. Here: MariaDB, which grew out of MySQL; PostgreSQL;
-- and SQLite, which has no server at all: it is a library, and Python brings it along.
--
-- Database system (DBS): the whole. Databases, the software (operating system, DBMS, programming
-- languages, tools) and the people: the database administrator (DBA) creates, watches and maintains.
--
-- How to get MariaDB:
--     Debian, Ubuntu    apt-get install mariadb-server
--     Fedora, CentOS    dnf -y install mariadb mariadb-server      (in the article's days: yum)
--     Windows, macOS    https://mariadb.org/download/     MySQL: https://dev.mysql.com/downloads/mysql/


-- ==== 2. A place of our own ======================================================================
-- Between /*! and */ stands code for MariaDB and MySQL; all others take it for a comment. There
-- the lesson works in a database of its own, which is made here and dropped at the end.
/*! DROP USER IF EXISTS 'db_notes_student'@'localhost' */;
/*! DROP DATABASE IF EXISTS db_notes_lesson */;
/*! CREATE DATABASE db_notes_lesson CHARACTER SET utf8mb4 */;
/*! USE db_notes_lesson */;
/*! SET NAMES utf8mb4 */;

-- A line that starts with /* /* */ -- */ is for PostgreSQL alone (rule 4 tells why). There the
-- lesson's tables are temporary ones, which no other session sees and which end with this one.
/* /* */ -- */ SET client_encoding TO 'UTF8';
/* /* */ -- */ SET client_min_messages TO warning;
/* /* */ -- */ SET search_path TO pg_temp;
/* /* */ -- */ DROP ROLE IF EXISTS db_notes_student;


-- ==== 3. Six rules ===============================================================================
-- SQL, the Structured Query Language, says what is wanted; how to do it is left to the DBMS.
-- To have something to ask about: the article's table, with three students.
CREATE TABLE tb_table (
    id   INTEGER     NOT NULL PRIMARY KEY,
    name VARCHAR(20) NOT NULL
);
INSERT INTO tb_table (id, name) VALUES (1, 'YUAN'), (2, 'LI'), (3, 'WANG');

-- Rule 1: case does not matter in keywords and column names. The habit: SELECT big, names small.
select NAME from tb_table where ID = 1;
-- > YUAN

-- "String constants are case-sensitive", the article adds. True of SQLite and PostgreSQL. MariaDB
-- leaves it to the collation, the rule by which strings compare, and its usual ones ignore case.
SELECT COUNT(*) FROM tb_table WHERE name = 'yuan';
-- > 0
-- > mariadb: 1
/*! SELECT COUNT(*) FROM tb_table WHERE name = 'yuan' COLLATE utf8mb4_bin */;
-- > mariadb: 0

-- LIKE has a mind of its own: it ignores case on SQLite too (for the letters A to Z).
SELECT COUNT(*) FROM tb_table WHERE name LIKE 'yu%';
-- > 1
-- > postgresql: 0

-- Names of tables: MariaDB keeps each table in a file of that name, so on Linux their case matters,
-- as it does not on Windows and macOS (1146: no such table).
-- try: SELECT COUNT(*) FROM TB_TABLE;
-- > sqlite: 3
-- > postgresql: 3
-- ! mariadb 1146

-- Rule 2: a statement may take several lines and ends with a semicolon. A keyword is never cut in
-- two, and never abbreviated.
SELECT COUNT(*)
FROM tb_table
;
-- > 3
-- try: SEL ECT COUNT(*) FROM tb_table;
-- ! sqlite OperationalError, mariadb 1064, postgresql 42601
-- try: SEL COUNT(*) FROM tb_table;
-- ! sqlite OperationalError, mariadb 1064, postgresql 42601

-- Rule 3: spaces and indentation are for the reader. A line for each clause makes editing easy.
SELECT id, name
FROM   tb_table
WHERE  name = 'YUAN';
-- > 1 | YUAN
-- One space does count: in MariaDB the names of some built-in functions, COUNT among them, must touch their parenthesis.
-- try: SELECT COUNT (*) FROM tb_table;
-- > sqlite: 3
-- > postgresql: 3
-- ! mariadb 1064

-- The article's own example has its string in double quotes, as MariaDB allows:
/*! SELECT * FROM tb_table WHERE NAME="YUAN" */;
-- > mariadb: 1 | YUAN
-- In the SQL standard '...' is a string and "..." is a name: PostgreSQL looks for a column YUAN.
-- SQLite's library looks for one too, and takes "YUAN" for a string when there is none, unless it
-- was built or told not to; the sqlite3 shell refuses from version 3.41 on.
-- try: SELECT * FROM tb_table WHERE NAME="YUAN";
-- > mariadb: 1 | YUAN
-- ! postgresql 42703
SELECT "name" FROM tb_table WHERE id = 1;
-- > YUAN
-- > mariadb: name
-- So: strings in single quotes, everywhere. A quote inside is doubled.
SELECT 'YUAN''s notes';
-- > YUAN's notes

-- Rule 4: comments. From -- to the end of the line, or from /* to */ over several lines.
SELECT 1 + 1; -- to the end of the line
-- > 2
SELECT 1 /* one,
            over two lines */ + 1;
-- > 2
SELECT '-- in a string it is text';
-- > -- in a string it is text
-- MySQL and MariaDB know a third sort, # to the end of the line.
/*! SELECT 1 # + 1
*/;
-- > mariadb: 1
-- Trap: they want a space after --. Without it, 5--3 is 5 minus minus 3.
SELECT 5--3
;
-- > 5
-- > mariadb: 8
-- Executable comments: /*! for both, with a version from that version on, /*M! for MariaDB alone
-- (so MySQL answers 2, 1, 1).
SELECT 1 /*! + 1 */, 1 /*!999999 + 1 */, 1 /*M! + 1 */;
-- > 1 | 1 | 1
-- > mariadb: 2 | 1 | 2
-- Trap: block comments nest in PostgreSQL. Two are opened here; the first */ closes one of them for
-- PostgreSQL and all for the others, who then read + 1 and a comment.
SELECT 1 /* /* */ + 1 -- */
;
-- > 2
-- > postgresql: 1

-- Rule 5: a statement may be folded wherever a space may stand.
SELECT name FROM tb_table
WHERE  id = 1
   OR  id = 3
ORDER BY id;
-- > YUAN
-- > WANG

-- Rule 6: statements come in three kinds.
--     DDL, data definition      CREATE ALTER DROP              tables and their like: chapter 4
--     DML, data manipulation    SELECT INSERT UPDATE DELETE    rows: chapters 5 and 6
--     DCL, data control         GRANT REVOKE                   who may do what: chapter 7
-- (Some books give SELECT its own kind, DQL, and COMMIT and ROLLBACK theirs, TCL.)
ALTER TABLE tb_table RENAME TO students;              -- DDL: now the name says what it holds
INSERT INTO students (id, name) VALUES (4, 'ZHAO');   -- DML
SELECT COUNT(*) FROM students;
-- > 4


-- ==== 4. DDL: the shape of the data ==============================================================
-- ALTER TABLE changes a table in use; rows that are there get the default.
ALTER TABLE students ADD COLUMN space INTEGER NOT NULL DEFAULT 1000;
ALTER TABLE students RENAME COLUMN space TO quota;
SELECT * FROM students WHERE name = 'YUAN';
-- > 1 | YUAN | 1000

-- CREATE TABLE: columns with types, and constraints, which hold whatever program writes.
--     PRIMARY KEY   names the row: never NULL, never twice
--     UNIQUE        never twice: a student has one file of a name
--     CHECK         a condition on every row
--     FOREIGN KEY   the row it points to must exist
CREATE TABLE files (
    id         INTEGER      NOT NULL PRIMARY KEY,
    name       VARCHAR(255) NOT NULL,
    size       INTEGER      NOT NULL,
    student_id INTEGER      NOT NULL,
    CONSTRAINT one_file_of_a_name UNIQUE (student_id, name),
    CONSTRAINT size_not_negative CHECK (size >= 0),
    CONSTRAINT owner_exists FOREIGN KEY (student_id) REFERENCES students (id)
);
CREATE TABLE transfers (
    id         INTEGER    NOT NULL PRIMARY KEY,
    student_id INTEGER    NOT NULL,
    file_id    INTEGER    NOT NULL,
    verb       VARCHAR(3) NOT NULL,
    bytes      INTEGER    NOT NULL,
    CONSTRAINT verb_known CHECK (verb IN ('put', 'get')),
    CONSTRAINT student_exists FOREIGN KEY (student_id) REFERENCES students (id),
    CONSTRAINT file_exists FOREIGN KEY (file_id) REFERENCES files (id)
);

INSERT INTO files (id, name, size, student_id) VALUES (1, 'notes.txt', 120, 1);
-- The id a second time, a name a second time, no name, a negative size (MySQL: 3819):
-- try: INSERT INTO files (id, name, size, student_id) VALUES (1, 'other.txt', 5, 1);
-- ! sqlite IntegrityError, mariadb 1062, postgresql 23505
-- try: INSERT INTO files (id, name, size, student_id) VALUES (2, 'notes.txt', 5, 1);
-- ! sqlite IntegrityError, mariadb 1062, postgresql 23505
-- try: INSERT INTO files (id, name, size, student_id) VALUES (2, NULL, 5, 1);
-- ! sqlite IntegrityError, mariadb 1048, postgresql 23502
-- try: INSERT INTO files (id, name, size, student_id) VALUES (2, 'odd.txt', -5, 1);
-- ! sqlite IntegrityError, mariadb 4025, postgresql 23514

-- A file of student 99, who is not there: SQLite lets it pass, until the connection is told to look.
-- try: INSERT INTO files (id, name, size, student_id) VALUES (9, 'ghost.txt', 5, 99);
-- ! sqlite ok, mariadb 1452, postgresql 23503
DELETE FROM files WHERE id = 9;                       -- if you typed that on SQLite
-- try: PRAGMA foreign_keys = ON;
-- ! sqlite ok, mariadb 1064, postgresql 42601
-- try: INSERT INTO files (id, name, size, student_id) VALUES (9, 'ghost.txt', 5, 99);
-- ! sqlite IntegrityError, mariadb 1452, postgresql 23503

-- The length in VARCHAR(20) is a limit too, though not to SQLite, which stores any text anywhere.
-- try: UPDATE students SET name = 'YUAN THE TWENTY-FIRST' WHERE id = 1;
-- ! sqlite ok, mariadb 1406, postgresql 22001
UPDATE students SET name = 'YUAN' WHERE id = 1;       -- likewise

-- CREATE INDEX: a sorted directory, as a book has. Answers stay the same and come sooner.
CREATE INDEX files_by_size ON files (size);
SELECT name FROM files WHERE size > 100;
-- > notes.txt
DROP INDEX files_by_size /*! ON files */;

-- CREATE VIEW: a SELECT with a name. It holds no rows; it looks them up each time.
CREATE VIEW big_files AS SELECT name, size FROM files WHERE size >= 500;
SELECT COUNT(*) FROM big_files;
-- > 0

-- A short life, CREATE to DROP. DROP asks nobody: the table and its rows are gone.
CREATE TABLE folders (
    id   INTEGER NOT NULL PRIMARY KEY,
    path VARCHAR(100),
    note VARCHAR(100)
);
/*! ALTER TABLE folders MODIFY COLUMN path VARCHAR(255) NOT NULL */;
/*! ALTER TABLE folders DROP COLUMN note */;          -- PostgreSQL too, and SQLite from 3.35 on
DROP TABLE folders;
-- try: SELECT * FROM folders;
-- ! sqlite OperationalError, mariadb 1146, postgresql 42P01
DROP TABLE IF EXISTS folders;


-- ==== 5. DML: rows in, rows out ==================================================================
-- INSERT: one row (as above), several, or those that a SELECT finds. Transfers 2 and 3: the upload
-- of lab.zip broke after 400 bytes and was resumed. 5 and 6: LI and WANG fetched it.
INSERT INTO files (id, name, size, student_id) VALUES
    (2, 'lab.zip', 900, 1),
    (3, '作业.txt', 60, 2);
INSERT INTO transfers (id, student_id, file_id, verb, bytes) VALUES
    (1, 1, 1, 'put', 120),
    (2, 1, 2, 'put', 400),
    (3, 1, 2, 'put', 500),
    (4, 2, 3, 'put', 60);
INSERT INTO transfers (id, student_id, file_id, verb, bytes)
SELECT students.id + 3, students.id, files.id, 'get', files.size
FROM   students CROSS JOIN files
WHERE  students.name IN ('LI', 'WANG') AND files.name = 'lab.zip';

-- SELECT: * is every column. Without ORDER BY the order is up to the DBMS.
SELECT * FROM transfers ORDER BY id;
-- > 1 | 1 | 1 | put | 120
-- > 2 | 1 | 2 | put | 400
-- > 3 | 1 | 2 | put | 500
-- > 4 | 2 | 3 | put | 60
-- > 5 | 2 | 2 | get | 900
-- > 6 | 3 | 2 | get | 900
SELECT * FROM big_files;
-- > lab.zip | 900

-- WHERE picks rows, ORDER BY sorts them (DESC: largest first), LIMIT and OFFSET cut a page out.
SELECT name, size FROM files WHERE size BETWEEN 50 AND 500 ORDER BY size DESC;
-- > notes.txt | 120
-- > 作业.txt | 60
SELECT id FROM transfers ORDER BY bytes DESC, id LIMIT 2 OFFSET 1;
-- > 6
-- > 3
SELECT DISTINCT verb FROM transfers ORDER BY verb;
-- > get
-- > put

-- NULL means unknown, and a comparison with it is unknown too: only IS NULL finds it.
SELECT COUNT(*) FROM students WHERE NULL = NULL;
-- > 0
SELECT COUNT(*) FROM students WHERE NULL IS NULL;
-- > 4

-- INNER JOIN: pairs of rows that belong together. LEFT JOIN: the left table's other rows as well,
-- with NULL for what is missing.
SELECT students.name, files.name
FROM   students
INNER  JOIN files ON files.student_id = students.id
ORDER BY files.id;
-- > YUAN | notes.txt
-- > YUAN | lab.zip
-- > LI | 作业.txt
SELECT students.name, files.name
FROM   students
LEFT   JOIN files ON files.student_id = students.id
WHERE  students.id > 1
ORDER BY students.id;
-- > LI | 作业.txt
-- > WANG | NULL
-- > ZHAO | NULL

-- GROUP BY: one row for each group. WHERE picks rows before, HAVING picks groups after.
SELECT   verb, COUNT(*), SUM(bytes)
FROM     transfers
GROUP BY verb
ORDER BY verb;
-- > get | 2 | 1800
-- > put | 4 | 1080
SELECT   student_id, SUM(bytes)
FROM     transfers
WHERE    verb = 'put'
GROUP BY student_id
HAVING   SUM(bytes) > 100;
-- > 1 | 1020
-- Trap: a column that is neither grouped nor aggregated. Which of a group's rows should it show?
-- SQLite and MariaDB show any one; PostgreSQL refuses (MySQL too: 1055).
-- try: SELECT verb, bytes FROM transfers GROUP BY verb;
-- ! sqlite ok, mariadb ok, postgresql 42803

-- Subquery: a SELECT inside another, for a value, for a list, or to ask whether there is any.
SELECT name FROM files WHERE size = (SELECT MAX(size) FROM files);
-- > lab.zip
SELECT name FROM students WHERE id NOT IN (SELECT student_id FROM transfers);
-- > ZHAO
SELECT name FROM files
WHERE  EXISTS (SELECT * FROM transfers WHERE transfers.file_id = files.id AND verb = 'get');
-- > lab.zip

-- Common table expression (CTE): a subquery with a name, written first. Is every upload whole?
WITH uploads AS (
    SELECT file_id, SUM(bytes) AS bytes FROM transfers WHERE verb = 'put' GROUP BY file_id
)
SELECT files.name, uploads.bytes, CASE WHEN uploads.bytes = files.size THEN 'whole' ELSE 'cut' END
FROM   files
INNER  JOIN uploads ON uploads.file_id = files.id
ORDER BY files.id;
-- > notes.txt | 120 | whole
-- > lab.zip | 900 | whole
-- > 作业.txt | 60 | whole
-- A recursive one feeds on its own rows: where do 400-byte chunks of a 900-byte file begin?
WITH RECURSIVE chunks (first_byte) AS (
    SELECT 0
    UNION ALL
    SELECT first_byte + 400 FROM chunks WHERE first_byte + 400 < 900
)
SELECT first_byte FROM chunks ORDER BY first_byte;
-- > 0
-- > 400
-- > 800

-- Window functions look at neighbouring rows, and keep every row: a running total, a rank.
SELECT id, bytes, SUM(bytes) OVER (ORDER BY id)
FROM   transfers
WHERE  file_id = 2 AND verb = 'put'
ORDER BY id;
-- > 2 | 400 | 400
-- > 3 | 500 | 900
SELECT name, size, ROW_NUMBER() OVER (PARTITION BY student_id ORDER BY size DESC)
FROM   files
ORDER BY id;
-- > notes.txt | 120 | 2
-- > lab.zip | 900 | 1
-- > 作业.txt | 60 | 1

-- UPDATE changes rows, DELETE removes them; without WHERE, all of them.
UPDATE files SET size = size + 30 WHERE name = 'notes.txt';
SELECT size FROM files WHERE name = 'notes.txt';
-- > 150
-- What is left of each quota, once the files are counted?
UPDATE students
SET    quota = quota - (SELECT COALESCE(SUM(size), 0) FROM files WHERE student_id = students.id);
SELECT name, quota FROM students ORDER BY id;
-- > YUAN | -50
-- > LI | 940
-- > WANG | 1000
-- > ZHAO | 1000
DELETE FROM transfers WHERE verb = 'get' AND student_id = 3;
SELECT COUNT(*) FROM transfers;
-- > 5
-- YUAN's files still point to YUAN. (SQLite: with foreign_keys on, as above.)
-- try: DELETE FROM students WHERE name = 'YUAN';
-- ! sqlite IntegrityError, mariadb 1451, postgresql 23503

-- Same words, other answers. Dividing integers (write 7 / 2.0 to be sure of 3.5):
SELECT 7 / 2;
-- > 3
-- > mariadb: 3.5
-- (MariaDB shows 3.5000. Numbers count as the same here, however many zeros are shown.)
-- || joins strings, but in MariaDB and MySQL it means OR (CONCAT joins there).
SELECT 'lab' || '.zip';
-- > lab.zip
-- > mariadb: 0
/*! SELECT CONCAT('lab', '.zip') */;
-- > mariadb: lab.zip
-- LENGTH counts characters, but bytes in MariaDB and MySQL (CHAR_LENGTH counts characters there). The
-- 255 that a file's name may have on Linux are bytes too: in UTF-8 each of these two takes three.
SELECT LENGTH('作业');
-- > 2
-- > mariadb: 6
/*! SELECT CHAR_LENGTH('作业') */;
-- > mariadb: 2


-- ==== 6. Transactions: all or nothing ============================================================
-- From BEGIN on, changes are provisional: COMMIT keeps them, ROLLBACK takes them back.
BEGIN;
DELETE FROM transfers;
SELECT COUNT(*) FROM transfers;
-- > 0
ROLLBACK;
SELECT COUNT(*) FROM transfers;
-- > 5

-- SAVEPOINT: a place to go back to without losing what came before it.
BEGIN;
UPDATE students SET quota = 2000 WHERE name = 'YUAN';
SAVEPOINT before_li;
UPDATE students SET quota = 0 WHERE name = 'LI';
ROLLBACK TO SAVEPOINT before_li;
COMMIT;
SELECT name, quota FROM students WHERE id <= 2 ORDER BY id;
-- > YUAN | 2000
-- > LI | 940

-- Trap: SQLite and PostgreSQL take back DDL as well; in MariaDB it commits at once, silently.
BEGIN;
CREATE TABLE hasty (id INTEGER NOT NULL PRIMARY KEY);
ROLLBACK;
-- try: SELECT COUNT(*) FROM hasty;
-- > mariadb: 0
-- ! sqlite OperationalError, postgresql 42P01
DROP TABLE IF EXISTS hasty;


-- ==== 7. DCL: who may do what ====================================================================
-- SQLite has no users: whoever may write the file may do all. MariaDB and MySQL have users, who log
-- in, and roles, which bundle rights; in PostgreSQL a role is both.
/*! CREATE USER 'db_notes_student'@'localhost' IDENTIFIED BY 'Put-4-Get-2' */;
/* /* */ -- */ CREATE ROLE db_notes_student;

-- What follows "student:" is typed as that user; to play along, run the notes line by line up to
-- here, then   mariadb -u db_notes_student -pPut-4-Get-2   in a second window; in psql, stay and say
-- SET ROLE db_notes_student, and RESET ROLE to be yourself again.
-- A new user may do nothing: 1044 is "no right to this database", 42501 "insufficient privilege".
-- student: USE db_notes_lesson;
-- ! mariadb 1044
-- student: SELECT COUNT(*) FROM transfers;
-- ! postgresql 42501

-- GRANT SELECT: reading works. Deleting is denied: 1142 is "no right to do this to that table".
/*! GRANT SELECT ON transfers TO 'db_notes_student'@'localhost' */;
/* /* */ -- */ GRANT SELECT ON transfers TO db_notes_student;
-- student: USE db_notes_lesson;
-- ! mariadb ok
-- student: SELECT COUNT(*) FROM transfers;
-- > 5
-- student: DELETE FROM transfers WHERE id = 4;
-- ! mariadb 1142, postgresql 42501
-- student: SELECT COUNT(*) FROM files;
-- ! mariadb 1142, postgresql 42501

-- GRANT DELETE: now it works. The catalogue, tables about tables, tells the rights.
/*! GRANT DELETE ON transfers TO 'db_notes_student'@'localhost' */;
/* /* */ -- */ GRANT DELETE ON transfers TO db_notes_student;
/*! SELECT privilege_type FROM information_schema.table_privileges
    WHERE grantee = '''db_notes_student''@''localhost''' ORDER BY privilege_type */;
-- > mariadb: DELETE
-- > mariadb: SELECT
/* /* */ -- */ SELECT has_table_privilege('db_notes_student', 'transfers', 'DELETE');
-- > postgresql: t
-- student: DELETE FROM transfers WHERE id = 4;
-- ! mariadb ok, postgresql ok
-- student: SELECT COUNT(*) FROM transfers;
-- > 4

-- REVOKE takes a right back. What was done with it stays done.
/*! REVOKE DELETE ON transfers FROM 'db_notes_student'@'localhost' */;
/* /* */ -- */ REVOKE DELETE ON transfers FROM db_notes_student;
-- student: DELETE FROM transfers WHERE id = 3;
-- ! mariadb 1142, postgresql 42501
-- student: SELECT COUNT(*) FROM transfers;
-- > 4
-- student: DROP TABLE transfers;
-- ! mariadb 1142, postgresql 42501
-- student: CREATE DATABASE db_notes_mine;
-- ! mariadb 1044, postgresql 42501

-- DENY, the article's third DCL command, is SQL Server's alone: a prohibition that outweighs every
-- GRANT, also one to a role that the user is in. The others know only rights that are there or not.
-- try: DENY DELETE ON transfers TO db_notes_student;
-- ! sqlite OperationalError, mariadb 1064, postgresql 42601

-- Who may run DCL? In SQL Server, says the article, by default members of these fixed roles:
--     sysadmin            of the server: may do everything
--     dbcreator           of the server: creates databases, and owns those that it creates
--     db_owner            of a database: may do everything in it
--     db_securityadmin    of a database: manages its roles and permissions
-- MariaDB and MySQL: who has the right itself, WITH GRANT OPTION. PostgreSQL: the table's owner, a
-- superuser, and who has the right WITH GRANT OPTION.


-- ==== 8. Sweeping up =============================================================================
-- In reverse: what points to others goes before what is pointed to.
DROP VIEW big_files;
DROP TABLE transfers;
DROP TABLE files;
DROP TABLE students;
/*! DROP USER 'db_notes_student'@'localhost' */;
/*! DROP DATABASE db_notes_lesson */;
/* /* */ -- */ DROP ROLE db_notes_student;
